"""A typed client of the retrieval service: knowledge bases are made, filled, changed and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from reimagen.retrieval.v1 import knowledge_base_pb2 as pb
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2_grpc

from client.channel import Tls, bearer, open_channel, retried
from client.errors import ServiceFailed
from client.retrieval_messages import (
    filter_message,
    found_of,
    info_of,
    lookup_message,
    outcome_of,
    pair_message,
    stored_of,
)
from client.retrieval_types import (
    FacetSpec,
    Filter,
    Found,
    KnowledgeBaseInfo,
    Lookup,
    Pair,
    Snapshot,
    Stats,
    StoredPair,
    UpsertOutcome,
)

TIMEOUT_S = 60.0
MAX_RESPONSE_BYTES = 256 << 20
BATCH_PAIRS, BATCH_BYTES = 64, 32 << 20  # of one UpsertPairs; the service takes 256 pairs and 64 MiB
DELETED_AT_ONCE = 1000

_SERVICE = "reimagen.retrieval.v1.KnowledgeBaseService"
# What may safely be done twice. An upsert may: the same pair again is no change.
_RETRIED = retried(
    ("reimagen.retrieval.v1.RetrievalService", "Retrieve"),
    *((_SERVICE, method) for method in ("ListKnowledgeBases", "GetKnowledgeBaseStats", "UpsertPairs", "DeletePairs")),
    *((_SERVICE, method) for method in ("GetPair", "ListPairs")),
)

M = TypeVar("M")


class RetrievalFailed(ServiceFailed):
    """The service refused a request or failed."""


class KnowledgeBases:
    """One channel to a retrieval service; safe to use from several threads. Everything here raises RetrievalFailed."""

    def __init__(
        self, address: str, *, api_key: str = "", tls: Tls | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Connects at the first call. Lookups and listings are tried again while the service is away.

        Args:
            address: unix:/path or host:port.
            api_key: an admin key changes, a read key reads.
            tls: whom to trust; None: the connection is in the clear.
            timeout_s: deadline of each call.
        """
        self._channel = open_channel(address, tls=tls, max_response_bytes=MAX_RESPONSE_BYTES, retries=_RETRIED)
        self._bases: Any = pb_grpc.KnowledgeBaseServiceStub(self._channel)
        self._retrieval: Any = retrieval_pb2_grpc.RetrievalServiceStub(self._channel)
        self._metadata = bearer(api_key)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def create(
        self,
        name: str,
        *,
        facets: Sequence[FacetSpec] = (),
        scene_phrases: Sequence[str] = (),
        embedding_size: int = 0,
    ) -> KnowledgeBaseInfo:
        """Make a knowledge base; `embedding_size` 0: that of the service's CLIP model."""
        request = pb.CreateKnowledgeBaseRequest(
            name=name,
            facets=[pb.Facet(name=f.name, template=f.template, values=f.values) for f in facets],
            scene_phrases=scene_phrases,
            embedding_size=embedding_size,
        )
        return info_of(self._call(self._bases.CreateKnowledgeBase, request).knowledge_base)

    def delete(self, name: str) -> None:
        """Remove a knowledge base with all its pairs."""
        self._call(self._bases.DeleteKnowledgeBase, pb.DeleteKnowledgeBaseRequest(name=name))

    def list(self) -> Iterator[KnowledgeBaseInfo]:
        """All knowledge bases, page by page."""
        token = ""
        while True:
            page = self._call(self._bases.ListKnowledgeBases, pb.ListKnowledgeBasesRequest(page_token=token))
            yield from map(info_of, page.knowledge_bases)
            token = page.next_page_token
            if not token:
                return

    def stats(self, name: str) -> Stats:
        """Sizes and state of one."""
        said = self._call(self._bases.GetKnowledgeBaseStats, pb.GetKnowledgeBaseStatsRequest(knowledge_base=name))
        numbers = {f: getattr(said, f) for f in Stats.__dataclass_fields__ if f != "knowledge_base"}
        return Stats(knowledge_base=info_of(said.knowledge_base), **numbers)

    def upsert(self, name: str, pairs: Iterable[Pair]) -> Iterator[UpsertOutcome]:
        """Add or replace pairs, in batches as the outcomes are asked for: what is yielded is durable."""
        for batch in _batches(map(pair_message, pairs)):
            request = pb.UpsertPairsRequest(knowledge_base=name, pairs=batch)
            yield from map(outcome_of, self._call(self._bases.UpsertPairs, request).results)

    def delete_pairs(self, name: str, pair_ids: Iterable[str]) -> int:
        """Remove pairs; how many were there."""
        num, ids = 0, iter(pair_ids)
        while batch := list(islice(ids, DELETED_AT_ONCE)):
            request = pb.DeletePairsRequest(knowledge_base=name, pair_ids=batch)
            num += self._call(self._bases.DeletePairs, request).num_deleted
        return num

    def get(
        self, name: str, pair_id: str, *, include_image: bool = True, include_embedding: bool = False
    ) -> StoredPair:
        """One pair."""
        request = pb.GetPairRequest(
            knowledge_base=name, pair_id=pair_id, include_image=include_image, include_embedding=include_embedding
        )
        return stored_of(self._call(self._bases.GetPair, request).pair)

    def list_pairs(self, name: str, *, filter: Filter | None = None, page_size: int = 500) -> Iterator[StoredPair]:
        """All pairs that the filter lets through, without pictures and embeddings, page by page."""
        token = ""
        while True:
            request = pb.ListPairsRequest(
                knowledge_base=name, page_size=page_size, page_token=token, filter=filter_message(filter or Filter())
            )
            page = self._call(self._bases.ListPairs, request)
            yield from map(stored_of, page.pairs)
            token = page.next_page_token
            if not token:
                return

    def snapshot(self, name: str) -> Snapshot:
        """Write a checked copy on the service's side."""
        said = self._call(self._bases.CreateSnapshot, pb.CreateSnapshotRequest(knowledge_base=name))
        return Snapshot(path=said.path, generation=said.generation, num_pairs=said.num_pairs, num_bytes=said.num_bytes)

    def retrieve(self, lookup: Lookup) -> Found:
        """The best pairs."""
        return found_of(self._call(self._retrieval.Retrieve, lookup_message(lookup)))

    def _call(self, method: Callable[..., M], request: Any) -> M:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise RetrievalFailed.of(error) from error


def _batches(pairs: Iterable[pb.NewPair]) -> Iterator[Sequence[pb.NewPair]]:
    """As many pairs as one request takes; one that is too large alone comes alone, for the service to refuse."""
    batch, num_bytes = list[pb.NewPair](), 0
    for pair in pairs:
        size = pair.ByteSize()
        if batch and (len(batch) == BATCH_PAIRS or num_bytes + size > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(pair)
        num_bytes += size
    if batch:
        yield batch
