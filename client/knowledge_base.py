"""A typed client of the retrieval service: knowledge bases are made, filled, changed and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from client import knowledge_base_calls as calls
from client.call import Call
from client.channel import Tls
from client.connection import Connection
from client.health import ServiceHealth
from client.knowledge_base_calls import BATCH_PAIRS, TIMEOUT_S, Page, RetrievalFailed
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
from client.retry import RetryPolicy

__all__ = ["BATCH_PAIRS", "KnowledgeBases", "Lookup", "RetrievalFailed"]

T = TypeVar("T")


class KnowledgeBases:
    """One channel to a retrieval service; safe to use from several threads. Everything here raises RetrievalFailed."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Connects at the first call. What may be done twice is tried again while the service is away.

        Args:
            address: see `client.channel.open_channel`.
            api_key: an admin key changes, a read key reads.
            tls: whom to trust; None: the connection is in the clear.
            timeout_s: deadline of each call.
            retry: None: `RetryPolicy()`.
        """
        policy = retry or RetryPolicy()
        self._connection = Connection(address, api_key=api_key, tls=tls, retry=policy, failure=RetrievalFailed)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._connection.close()

    def create(
        self,
        name: str,
        *,
        facets: Sequence[FacetSpec] = (),
        scene_phrases: Sequence[str] = (),
        embedding_size: int = 0,
    ) -> KnowledgeBaseInfo:
        """Make a knowledge base; `embedding_size` 0: that of the service's CLIP model."""
        return self._ask(calls.create(name, facets, scene_phrases, embedding_size))

    def delete(self, name: str) -> None:
        """Remove a knowledge base with all its pairs."""
        self._ask(calls.delete(name))

    def list(self) -> Iterator[KnowledgeBaseInfo]:
        """All knowledge bases, page by page."""
        return self._pages(calls.list_page)

    def stats(self, name: str) -> Stats:
        """Sizes and state of one."""
        return self._ask(calls.stats(name))

    def upsert(self, name: str, pairs: Iterable[Pair]) -> Iterator[UpsertOutcome]:
        """Add or replace pairs, in batches as the outcomes are asked for: what is yielded is durable."""
        for call in calls.upserts(name, pairs):
            yield from self._ask(call)

    def delete_pairs(self, name: str, pair_ids: Iterable[str]) -> int:
        """Remove pairs; how many were there."""
        return sum(self._ask(call) for call in calls.deletions(name, pair_ids))

    def get(
        self, name: str, pair_id: str, *, include_image: bool = True, include_embedding: bool = False
    ) -> StoredPair:
        """One pair."""
        return self._ask(calls.get(name, pair_id, include_image, include_embedding))

    def list_pairs(self, name: str, *, filter: Filter | None = None, page_size: int = 500) -> Iterator[StoredPair]:
        """All pairs that the filter lets through, without pictures and embeddings, page by page."""
        return self._pages(partial(calls.pairs_page, name, filter, page_size))

    def snapshot(self, name: str) -> Snapshot:
        """Write a checked copy on the service's side."""
        return self._ask(calls.snapshot(name))

    def retrieve(self, lookup: Lookup) -> Found:
        """The best pairs."""
        return self._ask(calls.retrieve(lookup))

    def health(self) -> tuple[ServiceHealth, ...]:
        """Whether the services answer; never fails."""
        return self._connection.health(calls.SERVICES)

    def _ask(self, call: Call[T]) -> T:
        return self._connection.ask(call, timeout_s=self._timeout_s)

    def _pages(self, page_call: Callable[[str], Call[Page[T]]]) -> Iterator[T]:
        token = ""
        while True:
            items, token = self._ask(page_call(token))
            yield from items
            if not token:
                return
