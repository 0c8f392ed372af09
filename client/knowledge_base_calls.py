"""What can be asked of the retrieval service: each a call with plain data in and out, for asyncio and without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from google.protobuf.message import Message
from reimagen.retrieval.v1 import knowledge_base_pb2 as pb
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2_grpc

from client.call import Call
from client.errors import ServiceFailed
from client.message_fields import fitted
from client.retrieval_messages import (
    facet_message,
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
SERVICES = ("reimagen.retrieval.v1.RetrievalService", "reimagen.retrieval.v1.KnowledgeBaseService")
BATCH_PAIRS, BATCH_BYTES = 64, 32 << 20  # of one UpsertPairs; the service takes 256 pairs and 64 MiB
DELETED_AT_ONCE = 1000

T = TypeVar("T")

Page = tuple[list[T], str]
"""Items, and the token of the next page; empty on the last one."""


class RetrievalFailed(ServiceFailed):
    """The service refused a request or failed."""


def create(
    name: str, facets: Sequence[FacetSpec], scene_phrases: Sequence[str], embedding_size: int
) -> Call[KnowledgeBaseInfo]:
    """Makes a knowledge base."""
    request = fitted(
        pb.CreateKnowledgeBaseRequest,
        name=name,
        facets=[facet_message(facet) for facet in facets],
        scene_phrases=scene_phrases,
        embedding_size=embedding_size,
    )
    return _call("CreateKnowledgeBase", request, lambda said: info_of(said.knowledge_base), may_repeat=False)


def delete(name: str) -> Call[None]:
    """Removes a knowledge base."""
    request = pb.DeleteKnowledgeBaseRequest(name=name)
    return _call("DeleteKnowledgeBase", request, lambda said: None, may_repeat=False)


def list_page(token: str) -> Call[Page[KnowledgeBaseInfo]]:
    """Knowledge bases."""
    request = pb.ListKnowledgeBasesRequest(page_token=token)
    return _call("ListKnowledgeBases", request, lambda said: _page(info_of, said.knowledge_bases, said))


def stats(name: str) -> Call[Stats]:
    """Sizes and state of one."""
    return _call("GetKnowledgeBaseStats", pb.GetKnowledgeBaseStatsRequest(knowledge_base=name), _stats_of)


def upserts(name: str, pairs: Iterable[Pair]) -> Iterator[Call[list[UpsertOutcome]]]:
    """Add or replace pairs, in batches. May be repeated: the same pair again is no change."""
    for batch in _batches(map(pair_message, pairs)):
        request = pb.UpsertPairsRequest(knowledge_base=name, pairs=batch)
        yield _call("UpsertPairs", request, lambda said: list(map(outcome_of, said.results)))


def deletions(name: str, pair_ids: Iterable[str]) -> Iterator[Call[int]]:
    """Remove pairs, in batches; each says how many were there."""
    ids = iter(pair_ids)
    while batch := list(islice(ids, DELETED_AT_ONCE)):
        request = pb.DeletePairsRequest(knowledge_base=name, pair_ids=batch)
        yield _call("DeletePairs", request, lambda said: said.num_deleted)


def get(name: str, pair_id: str, include_image: bool, include_embedding: bool) -> Call[StoredPair]:
    """One pair."""
    request = pb.GetPairRequest(
        knowledge_base=name, pair_id=pair_id, include_image=include_image, include_embedding=include_embedding
    )
    return _call("GetPair", request, lambda said: stored_of(said.pair))


def pairs_page(name: str, wanted: Filter | None, page_size: int, token: str) -> Call[Page[StoredPair]]:
    """Pairs that the filter lets through."""
    request = fitted(
        pb.ListPairsRequest,
        knowledge_base=name,
        page_size=page_size,
        page_token=token,
        filter=filter_message(wanted or Filter()),
    )
    return _call("ListPairs", request, lambda said: _page(stored_of, said.pairs, said))


def snapshot(name: str) -> Call[Snapshot]:
    """Writes a checked copy."""
    request = pb.CreateSnapshotRequest(knowledge_base=name)
    return _call("CreateSnapshot", request, partial(_plain, Snapshot), may_repeat=False)


def retrieve(lookup: Lookup) -> Call[Found]:
    """Looks pairs up."""
    stub = retrieval_pb2_grpc.RetrievalServiceStub
    return Call(stub=stub, method="Retrieve", request=lookup_message(lookup), read=found_of)


def _call(method: str, request: Message, read: Callable[[Any], T], *, may_repeat: bool = True) -> Call[T]:
    stub = pb_grpc.KnowledgeBaseServiceStub
    return Call(stub=stub, method=method, request=request, read=read, may_repeat=may_repeat)


def _page(read: Callable[[Any], T], items: Iterable[Any], said: Any) -> Page[T]:
    return list(map(read, items)), said.next_page_token


def _plain(kind: Any, said: Any, **known: Any) -> Any:
    """A dataclass whose fields are called as the message's."""
    return kind(**{f: getattr(said, f) for f in kind.__dataclass_fields__ if f not in known}, **known)


def _stats_of(said: Any) -> Stats:
    return _plain(Stats, said, knowledge_base=info_of(said.knowledge_base))


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
