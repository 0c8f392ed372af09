"""`knowledge_base` for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from client import knowledge_base_calls as calls
from client.async_connection import AsyncConnection
from client.call import Call
from client.channel import Tls
from client.health import ServiceHealth
from client.knowledge_base_calls import TIMEOUT_S, Page, RetrievalFailed
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

T = TypeVar("T")


class AsyncKnowledgeBases:
    """One channel to a retrieval service; see `KnowledgeBases`."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """See `KnowledgeBases`."""
        policy = retry or RetryPolicy()
        self._connection = AsyncConnection(address, api_key=api_key, tls=tls, retry=policy, failure=RetrievalFailed)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._connection.close()

    async def create(
        self,
        name: str,
        *,
        facets: Sequence[FacetSpec] = (),
        scene_phrases: Sequence[str] = (),
        embedding_size: int = 0,
    ) -> KnowledgeBaseInfo:
        """Make a knowledge base; `embedding_size` 0: that of the service's CLIP model."""
        return await self._ask(calls.create(name, facets, scene_phrases, embedding_size))

    async def delete(self, name: str) -> None:
        """Remove a knowledge base with all its pairs."""
        await self._ask(calls.delete(name))

    def list(self) -> AsyncIterator[KnowledgeBaseInfo]:
        """All knowledge bases, page by page."""
        return self._pages(calls.list_page)

    async def stats(self, name: str) -> Stats:
        """Sizes and state of one."""
        return await self._ask(calls.stats(name))

    async def upsert(self, name: str, pairs: Iterable[Pair]) -> AsyncIterator[UpsertOutcome]:
        """Add or replace pairs, in batches as the outcomes are asked for: what is yielded is durable."""
        for call in calls.upserts(name, pairs):
            for outcome in await self._ask(call):
                yield outcome

    async def delete_pairs(self, name: str, pair_ids: Iterable[str]) -> int:
        """Remove pairs; how many were there."""
        return sum([await self._ask(call) for call in calls.deletions(name, pair_ids)])

    async def get(
        self, name: str, pair_id: str, *, include_image: bool = True, include_embedding: bool = False
    ) -> StoredPair:
        """One pair."""
        return await self._ask(calls.get(name, pair_id, include_image, include_embedding))

    def list_pairs(self, name: str, *, filter: Filter | None = None, page_size: int = 500) -> AsyncIterator[StoredPair]:
        """All pairs that the filter lets through, without pictures and embeddings, page by page."""
        return self._pages(partial(calls.pairs_page, name, filter, page_size))

    async def snapshot(self, name: str) -> Snapshot:
        """Write a checked copy on the service's side."""
        return await self._ask(calls.snapshot(name))

    async def retrieve(self, lookup: Lookup) -> Found:
        """The best pairs."""
        return await self._ask(calls.retrieve(lookup))

    async def health(self) -> tuple[ServiceHealth, ...]:
        """Whether the services answer; never fails."""
        return await self._connection.health(calls.SERVICES)

    async def _ask(self, call: Call[T]) -> T:
        return await self._connection.ask(call, timeout_s=self._timeout_s)

    async def _pages(self, page_call: Callable[[str], Call[Page[T]]]) -> AsyncIterator[T]:
        token = ""
        while True:
            items, token = await self._ask(page_call(token))
            for item in items:
                yield item
            if not token:
                return
