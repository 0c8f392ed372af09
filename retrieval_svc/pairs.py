"""What a knowledge base is made of, and the two stores that hold it: plain data, no vendor.

`PairStore` is the source of truth (Qdrant); a `LexicalIndex` is a projection of it that can be thrown away and made again.
"""

from __future__ import annotations

import itertools
import unicodedata
import uuid
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np

_POINTS = uuid.UUID("8a1e9a5e-6f0e-5c7b-9d0c-0f6d6e1b7a10")  # namespace of point ids; never to be changed


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """One (image, caption) pair as it is stored.

    Attributes:
        pair_id: names the pair for good.
        entity: what the picture shows, without style and scene; what BM25 looks in.
        facets: facet name to value, e.g. style: noto.
        safe: declared safe by its source.
        image_sha256: hexadecimal, of the stored bytes; empty where the pair has a URI alone.
        image_format: svg, png, jpg or webp; empty where the pair has a URI alone.
        image_uri: where the picture is, where its bytes are not stored.
        attributes: further metadata, kept as it is.
        version: grows with every change of the knowledge base; nanoseconds since 1970, or one more than the last.
    """

    pair_id: str
    caption: str
    entity: str
    facets: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    source: str = ""
    license: str = ""
    safe: bool = False
    image_sha256: str = ""
    image_format: str = ""
    image_uri: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    version: int = 0

    @property
    def content(self) -> str:
        """Names the picture: pairs with the same content are duplicates."""
        return self.image_sha256 or self.image_uri


@dataclass(frozen=True, kw_only=True)
class PairFilter:
    """What pairs must have, and must not be. An empty part asks nothing.

    Attributes:
        facets: for each facet, the values of which a pair must have one.
        licenses, sources: of which a pair must have one.
        safe: only pairs declared safe (True), only others (False), all (None).
        excluded_pair_ids, excluded_contents: see `StoredPair`.
        excluded_names: `name_key` of entities.
    """

    facets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    licenses: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    safe: bool | None = None
    excluded_pair_ids: frozenset[str] = frozenset()
    excluded_contents: frozenset[str] = frozenset()
    excluded_names: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What decides whether a pair that a search found comes back; see `StoredPair`. The rest is read for those that do."""

    pair_id: str
    content: str
    version: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A pair that a leg found. `embedding` is float32 [D] of unit length, None where it was not asked for or there is none."""

    pair: StoredPair
    score: float
    embedding: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredBrief:
    """Like `Scored`, of a pair that has not been read."""

    pair: Brief
    score: float
    embedding: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """One entry of the store's history: the newest state of a point; `pair` is None where it was deleted."""

    point: str
    version: int
    pair: StoredPair | None


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What the lexical leg searches for.

    Attributes:
        entity: in full weight. details: what stands beside it, in less.
        facets: pairs that agree with more of these stand before others of the same score; they select nothing.
        alike: for each facet above, other values whose pairs stand in, in this order, where none agrees with all of these.
        limit: at most so many pairs come back.
    """

    entity: str
    details: tuple[str, ...] = ()
    facets: Mapping[str, str] = field(default_factory=dict)
    alike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limit: int = 64
    filter: PairFilter = field(default_factory=PairFilter)

    def tiers(self, chosen: Sized = ()) -> Iterator[list[tuple[tuple[str, str], ...]]]:
        """What decides among equal scores, tier by tier: a pair is in the first tier that lists facets it has all of.

        All that are asked for, one less, and so on; then values that are like them, the most alike first; then any. Where a
        pair is in the first tier, the last ones are one: nothing is to stand in for what is there (a network that is shown
        both may take either).

        Args:
            chosen: what was found so far, looked at once the first tier has been asked for.
        """
        has_own = False
        for num_agreeing in range(len(self.facets), 0, -1):
            yield list(itertools.combinations(self.facets.items(), num_agreeing))
            has_own = has_own or (num_agreeing == len(self.facets) and len(chosen) > 0)
        for likeness in itertools.zip_longest(*([(name, v) for v in self.alike[name]] for name in self.alike)):
            if has_own:
                break
            yield [(item,) for item in likeness if item is not None]
        yield [()]

    def tier_of(self, facets: Mapping[str, str]) -> int:
        """The number of the tier that a pair with these facets is in; see `places`."""
        num_agreeing = sum(facets.get(name) == value for name, value in self.facets.items())
        if num_agreeing:
            return len(self.facets) - num_agreeing
        places = [values.index(facets[name]) for name, values in self.alike.items() if facets.get(name) in values]
        return len(self.facets) + min(places, default=max(map(len, self.alike.values()), default=0))

    def places(self, facets: Sequence[Mapping[str, str]]) -> list[int]:
        """Of pairs of one score, which have these facets, the tier of each."""
        tiers = [self.tier_of(one) for one in facets]
        return [min(tier, len(self.facets)) for tier in tiers] if 0 in tiers else tiers


class PairStore(Protocol):
    """The source of truth. Safe to use from several threads; one process writes."""

    @property
    def embedding_size(self) -> int:
        """Size of the embeddings; 0: it holds none."""
        ...

    def upsert(self, pairs: Sequence[StoredPair], embeddings: Sequence[np.ndarray | None]) -> None:
        """Add or replace; durable on return. Embeddings are float32 [D], normalized here."""
        ...

    def delete(self, pair_ids: Sequence[str], version: int) -> int:
        """Remove; durable on return. The i-th removed gets version + i. Gives how many were there.

        What stays of a pair is a tombstone without content (its point and version), so that projections learn of it.
        """
        ...

    def get(self, pair_ids: Sequence[str], *, with_embeddings: bool = False) -> dict[str, Scored]:
        """Those that are there, by id; score is 0."""
        ...

    def page(self, *, after: str, limit: int, filter: PairFilter) -> tuple[list[StoredPair], str]:
        """Pairs in a fixed order from the token `after` ("" begins), and the token of the next page ("" at the end)."""
        ...

    def count(self, filter: PairFilter = PairFilter(), *, with_embedding: bool = False) -> int:
        """How many pairs there are (tombstones do not count)."""
        ...

    def contents_in_use(self, contents: Sequence[str]) -> set[str]:
        """Those of `contents` that some pair has."""
        ...

    def changes(self, since: int, limit: int) -> list[Change]:
        """Changes with a version above `since`, oldest first; tombstones among them."""
        ...

    def latest_version(self) -> int:
        """Version of the newest change; 0 for an empty store."""
        ...

    def nearest(
        self,
        embedding: np.ndarray,
        *,
        limit: int,
        filter: PairFilter,
        exact: bool = False,
        with_embeddings: bool = False,
    ) -> list[Scored]:
        """The most similar pairs by cosine, best first; `exact` compares with all (the oracle of recall)."""
        ...

    def nearest_briefs(
        self, embedding: np.ndarray, *, limit: int, filter: PairFilter, exact: bool = False
    ) -> list[ScoredBrief]:
        """`nearest`, in a third of the time: reading the pairs is most of it."""
        ...

    def drop_tombstones(self, before: int) -> None:
        """Forget deletions with a version below `before`."""
        ...

    def optimize(self) -> None:
        """Build what makes searching fast (HNSW, merged segments); blocks."""
        ...

    def stop_building(self) -> None:
        """`optimize`, under way or called later, gives up with RuntimeError: the store is about to be closed."""
        ...

    def snapshot(self, folder: Path) -> None:
        """Write a consistent copy into the empty `folder`."""
        ...

    def close(self) -> None:
        """Flush and let go of the files."""
        ...


class LexicalIndex(Protocol):
    """BM25 over entity text. Safe to use from several threads."""

    @property
    def num_pairs(self) -> int:
        """How many pairs it sees."""
        ...

    @property
    def generation(self) -> int:
        """Version of the newest change it sees."""
        ...

    def search(self, lookup: Lookup) -> list[Scored]:
        """At most `limit` pairs, best first, nothing deduplicated: the whole name, the name without details, the others."""
        ...

    def exact(self, entity: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs of this very entity (by `name_key`) that have all of these facets."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


def point_of(pair_id: str) -> str:
    """The pair's id in stores that want UUIDs."""
    return str(uuid.uuid5(_POINTS, pair_id))


def has_control_characters(text: str) -> bool:
    """Whether `text` holds control characters or half of a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


class Outcome(Enum):
    """What became of a pair that was to be stored."""

    CREATED = "created"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class NewPair:
    """A pair to store, as a caller gives it. See `StoredPair`; `image` or `image_uri` is given.

    Attributes:
        image: the file's bytes; its format is told by its content.
        entity: empty: the caption without facets and scene phrases.
        embedding: float32 [D]; None: the picture is embedded, if the knowledge base has an embedder.
    """

    pair_id: str
    caption: str
    image: bytes = b""
    image_uri: str = ""
    entity: str = ""
    facets: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    source: str = ""
    license: str = ""
    safe: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    embedding: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Upserted:
    """The outcome for one pair; of a rejected one the field at fault and why."""

    pair_id: str
    outcome: Outcome
    field: str = ""
    reason: str = ""
