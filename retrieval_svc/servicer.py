"""RetrievalService over gRPC: protobuf in, the domain, protobuf out; nothing else here knows protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from functools import partial

import grpc.aio
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from common.service.errors import InvalidArgument, NotFound
from retrieval_svc.knowledge_base import DEFAULT_K, KnowledgeBase, Method, Neighbor, Retrieval
from retrieval_svc.metrics import RetrievalMetrics

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name

_METHODS: Mapping[int, Method] = {
    pb.METHOD_UNSPECIFIED: Method.BM25,
    pb.METHOD_BM25: Method.BM25,
    pb.METHOD_CLIP: Method.CLIP,
    pb.METHOD_HYBRID: Method.HYBRID,
}
_METHOD_NUMBERS = {Method.BM25: pb.METHOD_BM25, Method.CLIP: pb.METHOD_CLIP, Method.HYBRID: pb.METHOD_HYBRID}


class RetrievalServicer(pb_grpc.RetrievalServiceServicer):
    """Answers from `knowledge_bases` (by name); searches run on `executor`, the event loop stays free."""

    def __init__(
        self, knowledge_bases: Mapping[str, KnowledgeBase], *, executor: Executor, metrics: RetrievalMetrics
    ) -> None:
        self._knowledge_bases = knowledge_bases
        self._executor = executor
        self._metrics = metrics

    async def Retrieve(self, request: pb.RetrieveRequest, context: grpc.aio.ServicerContext) -> pb.RetrieveResponse:
        """See retrieval.proto; errors are the domain's, and the call interceptor makes statuses of them."""
        knowledge_base = self._choose(request.knowledge_base)
        method = _METHODS.get(request.method)
        if method is None:
            raise InvalidArgument("method", f"{request.method} is no method")
        search = partial(
            knowledge_base.retrieve,
            request.prompt,
            k=request.k or DEFAULT_K,
            method=method,
            excluded_pair_ids=frozenset(request.excluded_pair_ids),
            exclude_exact=request.exclude_exact,
        )
        with self._metrics.search_s.time():
            retrieval = await asyncio.get_running_loop().run_in_executor(self._executor, search)
        self._metrics.results.labels(method.value).observe(len(retrieval.neighbors))
        if retrieval.shortfall_reason:
            self._metrics.shortfalls.labels(method.value).inc()
        return _response(knowledge_base, retrieval)

    def _choose(self, name: str) -> KnowledgeBase:
        if not name and len(self._knowledge_bases) == 1:
            return next(iter(self._knowledge_bases.values()))
        if name not in self._knowledge_bases:
            raise NotFound(f"knowledge_base: {name!r} is not one of {', '.join(sorted(self._knowledge_bases))}")
        return self._knowledge_bases[name]


def _response(knowledge_base: KnowledgeBase, retrieval: Retrieval) -> pb.RetrieveResponse:
    return pb.RetrieveResponse(
        neighbors=[_neighbor(neighbor) for neighbor in retrieval.neighbors],
        knowledge_base=knowledge_base.name,
        index_fingerprint=knowledge_base.fingerprint,
        method=_METHOD_NUMBERS[retrieval.method],
        shortfall_reason=retrieval.shortfall_reason,
        query=pb.UnderstoodQuery(
            entity=retrieval.query.entity,
            details=retrieval.query.details,
            facets=dict(retrieval.query.facets),
            scene_phrases=retrieval.query.scene_phrases,
        ),
    )


def _neighbor(neighbor: Neighbor) -> pb.Neighbor:
    return pb.Neighbor(
        pair_id=neighbor.pair_id,
        caption=neighbor.caption,
        entity=neighbor.entity,
        image=neighbor.image,
        image_format=neighbor.image_format,
        facets=dict(neighbor.facets),
        author=neighbor.author,
        source=neighbor.source,
        license=neighbor.license,
        score=neighbor.score,
        rank=neighbor.rank,
    )
