"""BM25 as sparse vectors, for knowledge bases past one machine: the engine multiplies in the inverse document frequency.

A dimension is a term: a word as it is spelled, or a stem. A document's value is the term frequency part of BM25
(Robertson and Zaragoza 2009, equation 3.15), a query's value the term's weight; with the engine's IDF their dot product is
the score that `bm25.py` gives, but for two things: the average length is a constant here (a document's vector must
not depend on the others), and terms share 2^32 dimensions by a hash.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from retrieval_svc.pairs import Lookup, PairFilter, PairStore, Scored, StoredPair
from retrieval_svc.payload import NUM_LEVELS
from retrieval_svc.words import STEM_WEIGHT, WORD_WEIGHT, name_key, stem_terms, tie_of, weighted_words, word_terms

K1, B = 1.2, 0.75
AVERAGE_WORDS = 2.5  # of an entity's name; never to be changed, for it is in every stored vector

_DIMENSION_BYTES = 4
_CACHED_TERMS = 1 << 16
_SCORE_DECIMALS = 4
_TIE_WINDOW = 8  # a tie is read whole up to so many times the limit


@dataclass(frozen=True, kw_only=True)
class SparseVector:
    """Dimensions, ascending and each once, and their values."""

    indices: tuple[int, ...]
    values: tuple[float, ...]


class SparseStore(PairStore, Protocol):
    """A pair store that searches the sparse vectors it writes (`document_vector` of the entity)."""

    def nearest_sparse(
        self,
        query: SparseVector,
        *,
        limit: int,
        filter: PairFilter,
        names: frozenset[str] = frozenset(),
        level: int = 0,
    ) -> list[Scored]:
        """The pairs with the greatest scores above 0, best first.

        `names`: only entities with one of these `name_key`s. `level`: only the 4^-level of all pairs whose `tie_of` is least.
        """
        ...

    def named(self, name: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs whose entity has this `name_key` and that have all of these facets, by id."""
        ...


class SparseIndex:
    """A `LexicalIndex` that asks the pair store itself: nothing to catch up with, nothing to rebuild."""

    def __init__(self, store: SparseStore) -> None:
        self._store = store

    @property
    def num_pairs(self) -> int:
        """How many pairs it sees."""
        return self._store.count()

    @property
    def generation(self) -> int:
        """Version of the newest change it sees."""
        return self._store.latest_version()

    def search(self, lookup: Lookup) -> list[Scored]:
        """At most `limit` pairs, best first: the whole name, then the name without details, then the others."""
        query = query_vector(lookup)
        if not query.indices or lookup.limit < 1:
            return []
        keys = dict.fromkeys((name_key(" ".join((lookup.entity, *lookup.details))), name_key(lookup.entity)))
        found: list[Scored] = []
        for key in keys:
            if key and key not in lookup.filter.excluded_names and len(found) < lookup.limit:
                found += self._best(query, lookup, lookup.limit - len(found), lookup.filter, frozenset((key,)))
        if len(found) < lookup.limit:
            others = replace(lookup.filter, excluded_names=lookup.filter.excluded_names | frozenset(keys))
            found += self._best(query, lookup, lookup.limit - len(found), others, frozenset())
        return found

    def exact(self, entity: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs of this very entity (by `name_key`) that have all of these facets, by id."""
        key = name_key(entity)
        return self._store.named(key, facets) if key else []

    def close(self) -> None:
        """Nothing: the store belongs to who opened it."""

    def _best(
        self, query: SparseVector, lookup: Lookup, limit: int, filter: PairFilter, names: frozenset[str]
    ) -> list[Scored]:
        """By score, ties by the lookup's tiers and hash."""
        window = limit * _TIE_WINDOW
        found = self._store.nearest_sparse(query, limit=window, filter=filter, names=names)
        if len(found) == window and _rounded(found[-1]) == _rounded(found[limit - 1]):
            score = _rounded(found[-1])
            above = [hit for hit in found if _rounded(hit) > score]
            found = above + self._tie(query, lookup, limit - len(above), window, filter, names, score)
        ordered = _in_order(found, lookup)
        return [replace(hit, score=_rounded(hit)) for hit in ordered[:limit]]

    def _tie(
        self,
        query: SparseVector,
        lookup: Lookup,
        limit: int,
        window: int,
        filter: PairFilter,
        names: frozenset[str],
        score: float,
    ) -> list[Scored]:
        """The first `limit` of a tie that is too long to be read, tier by tier."""
        chosen: dict[str, Scored] = {}
        for tier in lookup.tiers(chosen):
            fitting: dict[str, Scored] = {}
            for facets in tier:
                narrow = _narrowed(filter, facets)
                if narrow is not None:
                    thinned = self._thinned(query, window, narrow, names, score)
                    fitting |= {hit.pair.pair_id: hit for hit in thinned if hit.pair.pair_id not in chosen}
            first = sorted(fitting.values(), key=lambda hit: tie_of(hit.pair.pair_id))[: limit - len(chosen)]
            chosen |= {hit.pair.pair_id: hit for hit in first}
            if len(chosen) == limit:
                break
        return list(chosen.values())

    def _thinned(
        self, query: SparseVector, window: int, filter: PairFilter, names: frozenset[str], score: float
    ) -> list[Scored]:
        """The pairs with this score, or at least the first of them by hash: those of a level that fits into the window.

        Better pairs stand before them in the window; they are fewer than an eighth of it.
        """
        tied: dict[str, Scored] = {}
        for level in range(NUM_LEVELS + 1):
            found = self._store.nearest_sparse(query, limit=window, filter=filter, names=names, level=level)
            at_score = {hit.pair.pair_id: hit for hit in found if _rounded(hit) == score}
            # Thinned out too far (very unlikely): what the level before has shown fills up.
            tied = {**tied, **at_score} if len(at_score) * _TIE_WINDOW < window else at_score
            if len(found) < window or _rounded(found[-1]) < score:
                break
        return list(tied.values())


def document_vector(text: str) -> SparseVector:
    """What a pair with this entity is found by: for each term tf (k1 + 1) / (tf + k1 (1 - b + b length / average))."""
    words = word_terms(text)
    saturation = K1 * (1.0 - B + B * len(words) / AVERAGE_WORDS)
    terms = Counter([("word", word) for word in words] + [("stem", stem) for stem in stem_terms(text)])
    return _vector({term: tf * (K1 + 1.0) / (tf + saturation) for term, tf in terms.items()})


def query_vector(lookup: Lookup) -> SparseVector:
    """The words of the lookup with their weights: a stem that agrees counts, the same spelling adds to it."""
    weights: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (word, stem), weight in weighted_words(lookup).items():
        weights["word", word] += weight * WORD_WEIGHT
        weights["stem", stem] += weight * STEM_WEIGHT
    return _vector(weights)


@lru_cache(maxsize=_CACHED_TERMS)
def dimension(kind: str, term: str) -> int:
    """The dimension of a term, in [0, 2^32): the same on every machine and for good."""
    digest = hashlib.blake2b(f"{kind}:{term}".encode(), digest_size=_DIMENSION_BYTES).digest()
    return int.from_bytes(digest, "little")


def _vector(terms: Mapping[tuple[str, str], float]) -> SparseVector:
    values: defaultdict[int, float] = defaultdict(float)
    for (kind, term), value in terms.items():
        values[dimension(kind, term)] += value  # two terms on one dimension add up
    indices = tuple(sorted(values))
    return SparseVector(indices=indices, values=tuple(values[index] for index in indices))


def _narrowed(filter: PairFilter, facets: Iterable[tuple[str, str]]) -> PairFilter | None:
    """`filter`, and these facets as well; None: nothing can fulfil both."""
    asked = {name: frozenset((value,)) for name, value in facets}
    if any(filter.facets.get(name) and not values <= filter.facets[name] for name, values in asked.items()):
        return None
    return replace(filter, facets={**filter.facets, **asked})


def _rounded(hit: Scored) -> float:
    return round(hit.score, _SCORE_DECIMALS)


def _in_order(hits: Sequence[Scored], lookup: Lookup) -> list[Scored]:
    """By score, within a score by the lookup's tiers and hash."""
    by_score: defaultdict[float, list[Scored]] = defaultdict(list)
    for hit in hits:
        by_score[_rounded(hit)].append(hit)
    ordered: list[Scored] = []
    for score in sorted(by_score, reverse=True):
        tied = by_score[score]
        places = lookup.places([hit.pair.facets for hit in tied])
        keyed = sorted(zip(places, (tie_of(hit.pair.pair_id) for hit in tied), range(len(tied)), strict=True))
        ordered += [tied[number] for _, _, number in keyed]
    return ordered
