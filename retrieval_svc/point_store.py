"""A pair store over points with payload and vectors: what Qdrant in process and Qdrant on a server share. No vendor."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.service.errors import InvalidArgument
from retrieval_svc.pairs import Change, PairFilter, Scored, ScoredBrief, StoredPair, point_of
from retrieval_svc.payload import (
    BRIEF_FIELDS,
    VERSION_SLACK,
    Conditions,
    brief_of,
    change_of,
    conditions,
    is_point,
    is_tombstone,
    pair_of,
    payload_of,
    tombstone,
    unit,
    whole_changes,
)
from retrieval_svc.sparse import SparseVector, document_vector

BATCH = 1000  # points of one request, where all of them are wanted

_EVERYTHING = PairFilter()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point as it is written. `embedding` is float32 [D] of unit length."""

    point: str
    payload: Mapping[str, Any]
    embedding: np.ndarray | None = None
    sparse: SparseVector | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A point as it is read; `embedding` is there if it was asked for, `score` of a search."""

    point: str
    payload: Mapping[str, Any]
    embedding: np.ndarray | None = None
    score: float = 0.0


class Points(Protocol):
    """What an engine does with points. Writes are durable on return."""

    def write(self, rows: Sequence[Row]) -> None:
        """Add or replace points, whole."""
        ...

    def forget(self, points: Sequence[str]) -> None:
        """Remove points, leaving nothing."""
        ...

    def retrieve(self, points: Sequence[str], *, with_embeddings: bool) -> list[Found]:
        """Those of `points` that are there, live or deleted."""
        ...

    def scroll(self, wanted: Conditions, *, limit: int, after: str) -> tuple[list[Found], str]:
        """Points in the order of their ids from `after` ("" begins), and the id of the next one ("" at the end)."""
        ...

    def by_version(self, *, limit: int, at_least: float = 0.0, newest_first: bool = False) -> list[Found]:
        """Points in the order of their versions, those from about `at_least`: see VERSION_SLACK."""
        ...

    def count(self, wanted: Conditions) -> int:
        """How many points match, exactly."""
        ...

    def values(self, field: str, wanted: Conditions, limit: int) -> set[str]:
        """The values of a keyword field among the matching points."""
        ...

    def nearest(
        self,
        query: np.ndarray | SparseVector,
        wanted: Conditions,
        *,
        limit: int,
        exact: bool,
        with_embeddings: bool,
        fields: Sequence[str] = (),
    ) -> list[Found]:
        """The best points for an embedding, or for a sparse vector; with these fields of the payload, or all of it."""
        ...


class PointStore(ABC):
    """Everything of a `PairStore` and a `SparseStore` that engines do alike."""

    def __init__(self) -> None:
        self._writing = threading.Lock()

    @property
    @abstractmethod
    def embedding_size(self) -> int:
        """Size of the embeddings; 0: it holds none."""

    @abstractmethod
    def _points(self) -> AbstractContextManager[Points]:
        """The engine's points, for as long as the block lasts."""

    @abstractmethod
    def _touch(self, points: Iterator[str]) -> None:
        """Called under the write lock before points are written or forgotten."""

    def upsert(self, pairs: Sequence[StoredPair], embeddings: Sequence[np.ndarray | None]) -> None:
        """Add or replace; durable on return. Raises ValueError for an embedding of another size or without direction."""
        rows = [
            Row(
                point=point_of(pair.pair_id),
                payload=payload_of(pair),
                embedding=None if embedding is None else unit(embedding, self.embedding_size),
                sparse=document_vector(pair.entity),
            )
            for pair, embedding in zip(pairs, embeddings, strict=True)
        ]
        self.write_rows(rows)

    def write_rows(self, rows: Sequence[Row]) -> None:
        """Write points as they are, tombstones among them; durable on return."""
        if rows:
            with self._writing, self._points() as engine:
                self._touch(row.point for row in rows)
                engine.write(rows)

    def delete(self, pair_ids: Sequence[str], version: int) -> int:
        """Leave tombstones of those that are there, with versions from `version` up; durable on return."""
        points = [point_of(pair_id) for pair_id in dict.fromkeys(pair_ids)]
        with self._writing, self._points() as engine:
            found = engine.retrieve(points, with_embeddings=False)
            live = {record.point for record in found if not is_tombstone(record.payload)}
            gone = [point for point in points if point in live]
            if gone:
                self._touch(iter(gone))
                engine.write([Row(point=point, payload=tombstone(version + i)) for i, point in enumerate(gone)])
        return len(gone)

    def get(self, pair_ids: Sequence[str], *, with_embeddings: bool = False) -> dict[str, Scored]:
        """Those that are there, by id; score is 0."""
        points = [point_of(pair_id) for pair_id in dict.fromkeys(pair_ids)]
        with self._points() as engine:
            # A vector that a store was not made with is an error to ask for; its pairs have none.
            found = engine.retrieve(points, with_embeddings=with_embeddings and self.embedding_size > 0)
        scored = [_scored(record) for record in found if not is_tombstone(record.payload)]
        return {hit.pair.pair_id: hit for hit in scored}

    def page(self, *, after: str, limit: int, filter: PairFilter) -> tuple[list[StoredPair], str]:
        """Pairs in the order of their points. Raises InvalidArgument for a token that no page has given."""
        if after and not is_point(after):
            raise InvalidArgument("page_token", f"{after!r} is not a token that a page has given")
        with self._points() as engine:
            wanted = conditions(filter, is_deleted=False)
            records, following = engine.scroll(wanted, limit=limit, after=after)
        return [_pair(record) for record in records], following

    def count(self, filter: PairFilter = _EVERYTHING, *, with_embedding: bool = False) -> int:
        """How many pairs there are."""
        with self._points() as engine:
            return engine.count(conditions(filter, is_deleted=False, has_embedding=with_embedding))

    def contents_in_use(self, contents: Sequence[str]) -> set[str]:
        """Those of `contents` that some pair has."""
        used: set[str] = set()
        distinct = [content for content in dict.fromkeys(contents) if content]
        with self._points() as engine:
            for start in range(0, len(distinct), BATCH):
                asked = tuple(distinct[start : start + BATCH])
                used |= engine.values("content", Conditions(must=(("content", asked),)), len(asked))
        return used

    def changes(self, since: int, limit: int) -> list[Change]:
        """Changes above `since`, oldest first: at most `limit`, or more where they share the last version."""
        if limit < 1:
            raise ValueError(f"limit {limit} is below 1")
        at_least, size = float(max(since - VERSION_SLACK, 0)), limit + 2 * VERSION_SLACK
        while True:
            with self._points() as engine:
                records = engine.by_version(limit=size, at_least=at_least)
            found = [change_of(record.point, record.payload) for record in records]
            is_last = len(found) < size
            whole = whole_changes(found, since, limit, is_last=is_last)
            if whole or is_last:
                return whole
            size *= 4

    def latest_version(self) -> int:
        """Version of the newest change; 0 for an empty store."""
        with self._points() as engine:
            return _latest(engine)

    def nearest(
        self,
        embedding: np.ndarray,
        *,
        limit: int,
        filter: PairFilter,
        exact: bool = False,
        with_embeddings: bool = False,
    ) -> list[Scored]:
        """The most similar pairs by cosine, best first. Raises ValueError for an embedding of another size."""
        query = unit(embedding, self.embedding_size)
        wanted = conditions(filter)
        with self._points() as engine:
            found = engine.nearest(query, wanted, limit=limit, exact=exact, with_embeddings=with_embeddings)
        return [_scored(record) for record in found]

    def nearest_briefs(
        self, embedding: np.ndarray, *, limit: int, filter: PairFilter, exact: bool = False
    ) -> list[ScoredBrief]:
        """`nearest` without reading the pairs. Raises ValueError for an embedding of another size."""
        query, wanted = unit(embedding, self.embedding_size), conditions(filter)
        with self._points() as engine:
            found = engine.nearest(query, wanted, limit=limit, exact=exact, with_embeddings=False, fields=BRIEF_FIELDS)
        return [ScoredBrief(pair=brief_of(record.point, record.payload), score=record.score) for record in found]

    def nearest_sparse(
        self,
        query: SparseVector,
        *,
        limit: int,
        filter: PairFilter,
        names: frozenset[str] = frozenset(),
        level: int = 0,
    ) -> list[Scored]:
        """The pairs with the greatest BM25 scores, best first; `names` and `level` narrow as in `conditions`."""
        wanted = conditions(filter, names=names, level=level)
        with self._points() as engine:
            found = engine.nearest(query, wanted, limit=limit, exact=False, with_embeddings=False)
        return [_scored(record) for record in found]

    def named(self, name: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs whose entity has this `name_key` and that have all of these facets, by id."""
        asked = PairFilter(facets={facet: frozenset((value,)) for facet, value in facets.items()})
        wanted = conditions(asked, names=frozenset((name,)), is_deleted=False)
        pairs: list[StoredPair] = []
        after, is_last = "", False
        while not is_last:
            with self._points() as engine:
                records, after = engine.scroll(wanted, limit=BATCH, after=after)
            pairs += [_pair(record) for record in records]
            is_last = not after
        return sorted(pairs, key=lambda pair: pair.pair_id)

    def drop_tombstones(self, before: int) -> None:
        """Forget deletions with a version below `before`; the newest change stays, so that versions go on from it."""
        with self._writing, self._points() as engine:
            latest = _latest(engine)
            after, is_last = "", False
            while not is_last:
                records, after = engine.scroll(Conditions(is_deleted=True), limit=BATCH, after=after)
                versions = {record.point: record.payload["version"] for record in records}
                old = [point for point, version in versions.items() if version < before and version != latest]
                if old:
                    self._touch(iter(old))
                    engine.forget(old)
                is_last = not after


def _latest(engine: Points) -> int:
    newest = engine.by_version(limit=1, newest_first=True)
    return int(newest[0].payload["version"]) if newest else 0


def _pair(record: Found) -> StoredPair:
    return pair_of(record.point, record.payload)


def _scored(record: Found) -> Scored:
    return Scored(pair=_pair(record), score=record.score, embedding=record.embedding)


def copied(record: Found) -> Row:
    """A point that was read with its embedding, as it is written elsewhere."""
    sparse = None if is_tombstone(record.payload) else document_vector(record.payload["entity"])
    return Row(point=record.point, payload=record.payload, embedding=record.embedding, sparse=sparse)
