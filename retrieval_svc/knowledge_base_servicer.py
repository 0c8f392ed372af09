"""KnowledgeBaseService over gRPC: makes, changes and describes knowledge bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc.aio
from reimagen.retrieval.v1 import knowledge_base_pb2 as pb
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc as pb_grpc

from common.service.errors import FailedPrecondition, InvalidArgument, NotFound
from retrieval_svc.admission import Admission
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.metrics import RetrievalMetrics
from retrieval_svc.servicer import choose
from retrieval_svc.wire import (
    facets_of,
    filter_of,
    knowledge_base_message,
    new_pair_of,
    stored_pair_message,
    upsert_result,
)

_SERVICE = pb.DESCRIPTOR.services_by_name["KnowledgeBaseService"]
SERVICE_NAME: str = _SERVICE.full_name
_READING = frozenset({"ListKnowledgeBases", "GetKnowledgeBaseStats", "GetPair", "ListPairs"})
ADMIN_METHODS = frozenset(f"/{SERVICE_NAME}/{m.name}" for m in _SERVICE.methods if m.name not in _READING)

MAX_UPSERTED, MAX_DELETED = 256, 1000
DEFAULT_PAGE, MAX_PAGE = 100, 1000


class KnowledgeBaseServicer(pb_grpc.KnowledgeBaseServiceServicer):
    """Reads run among the searches; changes on threads of their own, so that they do not wait for one another."""

    def __init__(
        self,
        library: Library,
        *,
        searches: Admission,
        changes: Admission,
        metrics: RetrievalMetrics,
        snapshots: Path | None,
    ) -> None:
        """`snapshots` is the folder in which snapshots are made; None: none are."""
        self._library = library
        self._searches = searches
        self._changes = changes
        self._metrics = metrics
        self._snapshots = snapshots

    async def CreateKnowledgeBase(
        self, request: pb.CreateKnowledgeBaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateKnowledgeBaseResponse:
        """See knowledge_base.proto, here and below; errors are the domain's."""
        create = partial(
            self._library.create,
            request.name,
            facets=facets_of(request.facets),
            scene_phrases=tuple(request.scene_phrases),
            embedding_size=request.embedding_size or None,
        )
        made = await self._changes.run(create)
        return pb.CreateKnowledgeBaseResponse(knowledge_base=knowledge_base_message(made.manifest))

    async def DeleteKnowledgeBase(
        self, request: pb.DeleteKnowledgeBaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteKnowledgeBaseResponse:
        if not request.name:
            raise InvalidArgument("name", "is empty")
        await self._changes.run(partial(self._library.delete, request.name))
        return pb.DeleteKnowledgeBaseResponse()

    async def ListKnowledgeBases(
        self, request: pb.ListKnowledgeBasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListKnowledgeBasesResponse:
        limit = _page_size(request.page_size)
        names = [name for name in self._library.names() if name > request.page_token]
        return pb.ListKnowledgeBasesResponse(
            knowledge_bases=list(self._described(names[:limit])),
            next_page_token=names[limit - 1] if len(names) > limit else "",
        )

    async def GetKnowledgeBaseStats(
        self, request: pb.GetKnowledgeBaseStatsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetKnowledgeBaseStatsResponse:
        knowledge_base = choose(self._library, request.knowledge_base)
        stats = await self._searches.run(knowledge_base.stats)
        return pb.GetKnowledgeBaseStatsResponse(
            knowledge_base=knowledge_base_message(knowledge_base.manifest),
            num_pairs=stats.num_pairs,
            num_embeddings=stats.num_embeddings,
            num_indexed_pairs=stats.num_indexed_pairs,
            num_images=stats.num_images,
            image_bytes=stats.image_bytes,
            disk_bytes=stats.disk_bytes,
            stored_generation=stats.stored_generation,
            index_generation=stats.index_generation,
        )

    async def UpsertPairs(
        self, request: pb.UpsertPairsRequest, context: grpc.aio.ServicerContext
    ) -> pb.UpsertPairsResponse:
        _check_number("pairs", len(request.pairs), MAX_UPSERTED)
        knowledge_base = self._named(request.knowledge_base)

        def upsert() -> pb.UpsertPairsResponse:
            outcomes, generation = knowledge_base.upsert([new_pair_of(pair) for pair in request.pairs])
            return pb.UpsertPairsResponse(results=map(upsert_result, outcomes), generation=generation)

        response = await self._changes.run(upsert)
        for result in response.results:
            outcome = pb.UpsertResult.Outcome.Name(result.outcome).removeprefix("OUTCOME_").lower()
            self._metrics.changed_pairs.labels(outcome).inc()
        return response

    async def DeletePairs(
        self, request: pb.DeletePairsRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeletePairsResponse:
        _check_number("pair_ids", len(request.pair_ids), MAX_DELETED)
        knowledge_base = self._named(request.knowledge_base)
        num_deleted, generation = await self._changes.run(partial(knowledge_base.delete, list(request.pair_ids)))
        self._metrics.changed_pairs.labels("deleted").inc(num_deleted)
        return pb.DeletePairsResponse(num_deleted=num_deleted, generation=generation)

    async def GetPair(self, request: pb.GetPairRequest, context: grpc.aio.ServicerContext) -> pb.GetPairResponse:
        if not request.pair_id:
            raise InvalidArgument("pair_id", "is empty")
        knowledge_base = choose(self._library, request.knowledge_base)
        get = partial(
            knowledge_base.get,
            request.pair_id,
            with_image=request.include_image,
            with_embedding=request.include_embedding,
        )
        whole = await self._searches.run(get)
        message = stored_pair_message(whole.pair, image=whole.image, embedding=whole.embedding)
        return pb.GetPairResponse(pair=message)

    async def ListPairs(self, request: pb.ListPairsRequest, context: grpc.aio.ServicerContext) -> pb.ListPairsResponse:
        knowledge_base = choose(self._library, request.knowledge_base)
        page = partial(
            knowledge_base.page,
            after=request.page_token,
            limit=_page_size(request.page_size),
            filter=filter_of(request.filter),
        )
        pairs, next_page_token = await self._searches.run(page)
        return pb.ListPairsResponse(pairs=map(stored_pair_message, pairs), next_page_token=next_page_token)

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateSnapshotResponse:
        if self._snapshots is None:
            raise FailedPrecondition("this service has no folder for snapshots", reason="SNAPSHOTS_NOT_CONFIGURED")
        knowledge_base = self._named(request.knowledge_base)
        report = await self._changes.run(partial(knowledge_base.snapshot, self._snapshots))
        return pb.CreateSnapshotResponse(
            path=str(report.folder),
            generation=report.generation,
            num_pairs=report.num_pairs,
            num_bytes=report.num_bytes,
        )

    def _named(self, name: str) -> KnowledgeBase:
        """Whoever changes something says where."""
        if not name:
            raise InvalidArgument("knowledge_base", "is empty")
        return self._library.get(name)

    def _described(self, names: Sequence[str]) -> Iterator[pb.KnowledgeBase]:
        for name in names:
            with suppress(NotFound):  # deleted a moment ago
                yield knowledge_base_message(self._library.get(name).manifest)


def _page_size(asked: int) -> int:
    if asked > MAX_PAGE:
        raise InvalidArgument("page_size", f"{asked} is more than {MAX_PAGE}")
    return asked or DEFAULT_PAGE


def _check_number(field: str, num: int, limit: int) -> None:
    if not 1 <= num <= limit:
        raise InvalidArgument(field, f"holds {num}; 1 to {limit} are taken")
