"""One search: the legs are asked side by side, what must not come back is left out, and the place is filled up.

BM25 and CLIP are *legs*. Each gives candidates, best first, every picture once; filters and exclusions work inside it.
What still falls out afterwards (the same picture twice, pairs that look alike, pairs deleted a moment ago) is made up for
by asking for more, until k are found or the legs have nothing left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from common.service.errors import FailedPrecondition, InvalidArgument, ServiceError, Unavailable
from common.service.redaction import redacted_trace
from retrieval_svc.candidates import Found, alone, fused
from retrieval_svc.fusion import maximal_marginal_relevance, without_near_duplicates
from retrieval_svc.legs import GROWTH, MAX_CANDIDATES, SPARE, Candidate, Fetch, IsCurrent, Leg
from retrieval_svc.manifest import Manifest
from retrieval_svc.pairs import Brief, LexicalIndex, Lookup, PairFilter, PairStore, Scored, StoredPair
from retrieval_svc.query import UnderstoodPrompt, Vocabulary
from retrieval_svc.query_rules import check_query
from retrieval_svc.query_vector import PictureEmbedder
from retrieval_svc.retrieval import Method, Query
from retrieval_svc.words import name_key

MIN_DEPTH = 32  # candidates of each leg that are fused or diversified, at least
DEPTH_PER_RESULT = 4

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """At most k, best first; embeddings of those that have one, if they were asked for."""

    found: tuple[Found, ...]
    query: UnderstoodPrompt | None
    shortfall_reason: str
    failed_legs: Mapping[Method, str]
    leg_seconds: Mapping[Method, float]
    embeddings: Mapping[str, np.ndarray]


class Searcher:
    """Answers queries from the two indexes of one knowledge base; safe to use from several threads."""

    def __init__(
        self, *, store: PairStore, lexical: LexicalIndex, embedder: PictureEmbedder, executor: Executor
    ) -> None:
        self._store = store
        self._lexical = lexical
        self._embedder = embedder
        self._executor = executor

    def search(
        self, query: Query, *, manifest: Manifest, vocabulary: Vocabulary, is_current: IsCurrent
    ) -> SearchResult:
        """The k best pairs.

        Args:
            is_current: whether a pair that a leg gives is still what the store holds.

        Raises:
            InvalidArgument, FailedPrecondition: see `check_query`, `Vocabulary.understand` and `PictureEmbedder`.
            Unavailable: no leg could answer.
        """
        check_query(query, manifest)
        understood = vocabulary.understand(query.prompt) if _needs_prompt(query) else None
        clip = query.method is not Method.BM25
        if clip and ((query.prompt.strip() and query.weights.text) or (query.image and query.weights.image)):
            self._embedder.check()
        without = self._exclusions(query, understood, manifest)
        if query.exclude_exact and understood is not None:
            asked = _AskedPair(understood, manifest)
            is_current = partial(_is_current_and_other, is_current, asked)  # also what BM25 has not taken in yet
        fetches: dict[Method, Fetch] = {}
        if query.method is not Method.CLIP:
            assert understood is not None
            fetches[Method.BM25] = self._words(understood, manifest)
        if clip:
            fetches[Method.CLIP] = self._nearest(query)
        legs = {method: Leg(fetch=fetch, filter=without, is_current=is_current) for method, fetch in fetches.items()}
        return _Search(
            query=query, understood=understood, legs=legs, store=self._store, executor=self._executor
        ).result()

    def _words(self, understood: UnderstoodPrompt, manifest: Manifest) -> Fetch:
        asked = [(facet, understood.facets.get(facet.name, "")) for facet in manifest.facets]
        alike = {facet.name: facet.alike[value] for facet, value in asked if value in facet.alike}

        def fetch(limit: int, within: PairFilter, exact: bool) -> list[Scored]:
            return self._lexical.search(
                Lookup(
                    entity=understood.entity,
                    details=understood.details,
                    facets=understood.facets,
                    alike=alike,
                    limit=limit,
                    filter=within,
                )
            )

        return fetch

    def _nearest(self, query: Query) -> Fetch:
        vectors: list[np.ndarray] = []
        # MMR and near duplicates compare all candidates: their vectors come along, else those of the results alone.
        compare = bool(query.diversity or query.near_duplicate_similarity)
        # Most candidates of two legs do not come back, and reading them would be most of the work.
        brief = query.method is Method.HYBRID and not compare and not query.exclude_exact

        def fetch(limit: int, within: PairFilter, exact: bool) -> Sequence[Candidate]:
            if not vectors:
                vectors.append(self._embedder.query(query))
            if brief:
                return self._store.nearest_briefs(vectors[0], limit=limit, filter=within, exact=exact)
            return self._store.nearest(vectors[0], limit=limit, filter=within, exact=exact, with_embeddings=compare)

        return fetch

    def _exclusions(self, query: Query, understood: UnderstoodPrompt | None, manifest: Manifest) -> PairFilter:
        """The query's filter, and all that must not come back: excluding a pair excludes its picture."""
        given = query.filter
        ids, contents, names = set(given.excluded_pair_ids), set(given.excluded_contents), set(given.excluded_names)
        if ids:
            contents |= {scored.pair.content for scored in self._store.get(sorted(ids)).values()}
        names |= {name_key(entity) for entity in query.excluded_entities}
        if query.exclude_exact and understood is not None:
            asked = _AskedPair(understood, manifest)
            for pair in (p for entity in asked.entities for p in self._lexical.exact(entity, asked.facets)):
                if asked.is_it(pair):
                    ids.add(pair.pair_id)
                    contents.add(pair.content)
        return replace(
            given,
            excluded_pair_ids=frozenset(ids),
            excluded_contents=frozenset(contents - {""}),
            excluded_names=frozenset(names),
        )


class _AskedPair:
    """The pair that a prompt asks for: its entity, and every facet as it names it. Without a style: none that has one."""

    def __init__(self, understood: UnderstoodPrompt, manifest: Manifest) -> None:
        self._known = [facet.name for facet in manifest.facets]
        self.facets = {name: value for name, value in understood.facets.items() if name in self._known}
        self.entities = dict.fromkeys((" ".join((understood.entity, *understood.details)), understood.entity))
        self._keys = {name_key(entity) for entity in self.entities}

    def is_it(self, pair: StoredPair) -> bool:
        """Whether this is one of them."""
        if any(pair.facets.get(name) != self.facets.get(name) for name in self._known):
            return False
        return name_key(pair.entity) in self._keys


def _is_current_and_other(is_current: IsCurrent, asked: _AskedPair, pair: StoredPair | Brief) -> bool:
    assert isinstance(pair, StoredPair)  # see `Searcher._nearest`
    return is_current(pair) and not asked.is_it(pair)


class _Search:
    """The state of one query."""

    def __init__(
        self,
        *,
        query: Query,
        understood: UnderstoodPrompt | None,
        legs: dict[Method, Leg],
        store: PairStore,
        executor: Executor,
    ) -> None:
        self._query = query
        self._understood = understood
        self._legs = legs
        self._all_legs = dict(legs)  # those that fail, too
        self._store = store
        self._executor = executor
        self._failed: dict[Method, str] = {}
        self._embeddings: dict[str, np.ndarray] = {}
        self._without_embedding: set[str] = set()

    def result(self) -> SearchResult:
        """Look further until k are found."""
        query = self._query
        compare = bool(query.diversity or query.near_duplicate_similarity)
        together = query.method is Method.HYBRID or query.diversity > 0.0
        depth = max(MIN_DEPTH, DEPTH_PER_RESULT * query.k) if together else query.k + (SPARE if compare else 0)
        while True:
            rankings = self._reach(depth)
            candidates = fused(rankings) if query.method is Method.HYBRID else alone(rankings)
            if compare:
                self._fetch_embeddings(list(candidates))
            chosen, num_alike = self._choose(list(candidates))
            if len(chosen) == query.k or not self._can_look_further(depth):
                pairs = self._pairs([candidates[pair_id].pair for pair_id in chosen], rankings)
                if pairs is not None:
                    break
            elif any(len(leg.unique) > depth or not leg.is_exhausted for leg in self._legs.values()):
                depth *= GROWTH
            else:
                # HNSW is approximate and may miss some: before there are said to be no more, all are compared.
                self._legs[Method.CLIP].look_exactly()
        if query.include_embeddings:
            self._fetch_embeddings(chosen)
        return SearchResult(
            found=tuple(candidates[i].found(pair, rankings) for i, pair in zip(chosen, pairs, strict=True)),
            query=self._understood,
            shortfall_reason=self._shortfall(len(chosen), num_alike) if len(chosen) < query.k else "",
            failed_legs=self._failed,
            leg_seconds={method: leg.elapsed_s for method, leg in self._all_legs.items()},
            embeddings=self._embeddings,
        )

    def _can_look_further(self, depth: int) -> bool:
        nearest = self._legs.get(Method.CLIP)
        is_more = any(len(leg.unique) > depth or not leg.is_exhausted for leg in self._legs.values())
        return is_more or (nearest is not None and not nearest.is_exact)

    def _reach(self, depth: int) -> dict[Method, list[Candidate]]:
        """Every leg's candidates, the legs side by side; one that fails is left out from then on."""
        if len(self._legs) == 1 and not self._failed and self._query.method is not Method.HYBRID:
            ((method, leg),) = self._legs.items()
            rankings = {method: leg.reach(depth)}
        else:
            rankings = self._reach_side_by_side(depth)
        for ranking in rankings.values():
            self._embeddings |= {s.pair.pair_id: s.embedding for s in ranking if s.embedding is not None}
        return rankings

    def _reach_side_by_side(self, depth: int) -> dict[Method, list[Candidate]]:
        elsewhere: dict[Method, Future[list[Candidate]]] = {}
        if len(self._legs) > 1:
            elsewhere[Method.CLIP] = self._executor.submit(self._legs[Method.CLIP].reach, depth)
        rankings: dict[Method, list[Candidate]] = {}
        for method, leg in list(self._legs.items()):  # BM25 first: here, while CLIP is asked over there
            try:
                rankings[method] = elsewhere[method].result() if method in elsewhere else leg.reach(depth)
            except (InvalidArgument, FailedPrecondition):
                raise  # the caller's to mend: nothing has failed
            except Exception as error:
                self._leave_out(method, error)
        return rankings

    def _leave_out(self, method: Method, error: Exception) -> None:
        """Go on without a leg that has failed. Raises Unavailable if it was the last one."""
        self._failed[method] = _reason(error)
        del self._legs[method]
        trace = redacted_trace(error, (self._query.prompt,))
        _LOG.error("leg_failed", extra={"leg": method.value, "trace": trace})
        if not self._legs:
            reasons = "; ".join(f"{method.name}: {reason}" for method, reason in self._failed.items())
            raise Unavailable(f"no leg of the search could answer ({reasons})") from error

    def _pairs(
        self, chosen: Sequence[StoredPair | Brief], rankings: Mapping[Method, Sequence[Candidate]]
    ) -> list[StoredPair] | None:
        """The chosen pairs, whole; None where one has changed since it was found, or the store fails: to be chosen again."""
        known = {(s.pair.pair_id, s.pair.version): s.pair for ranking in rankings.values() for s in ranking}
        known = {key: pair for key, pair in known.items() if isinstance(pair, StoredPair)}
        missing = [pair.pair_id for pair in chosen if (pair.pair_id, pair.version) not in known]
        if missing:
            try:
                stored = self._store.get(missing)
            except Exception as error:
                self._leave_out(Method.CLIP, error)
                return None
            known |= {(s.pair.pair_id, s.pair.version): s.pair for s in stored.values()}
        pairs = [known.get((pair.pair_id, pair.version)) for pair in chosen]
        if None in pairs:
            self._legs[Method.CLIP].look_again()
            return None
        return [pair for pair in pairs if pair is not None]

    def _choose(self, pair_ids: list[str]) -> tuple[list[str], int]:
        query = self._query
        num_alike = 0
        if query.near_duplicate_similarity:
            limit = len(pair_ids) if query.diversity else query.k
            pair_ids, num_alike = without_near_duplicates(
                pair_ids, self._embeddings, similarity=query.near_duplicate_similarity, limit=limit
            )
        chosen = maximal_marginal_relevance(pair_ids, self._embeddings, diversity=query.diversity, k=query.k)
        return chosen, num_alike

    def _fetch_embeddings(self, pair_ids: Sequence[str]) -> None:
        missing = [i for i in pair_ids if i not in self._embeddings and i not in self._without_embedding]
        if not missing:
            return
        try:
            stored = self._store.get(missing, with_embeddings=True)
        except Exception as error:
            if Method.CLIP not in self._failed:
                raise
            # The store is what has failed, and BM25 answers alone: without comparing what pairs look like.
            _LOG.warning("embeddings_missing", extra={"reason": _reason(error)})
            stored = {}
        for pair_id in missing:
            embedding = stored[pair_id].embedding if pair_id in stored else None
            if embedding is None:
                self._without_embedding.add(pair_id)
            else:
                self._embeddings[pair_id] = embedding

    def _shortfall(self, num_found: int, num_alike: int) -> str:
        """Why there are no more."""
        query, legs = self._query, self._legs.values()
        left_out = (
            (self._num_excluded(), "excluded"),
            (max(leg.num_duplicates for leg in legs), "duplicate"),
            (num_alike, "nearly duplicate"),
        )
        also = ", ".join(f"{num} {what}" for num, what in left_out if num)
        if any(leg.is_cut for leg in legs):
            why = f"no other pair among the best {MAX_CANDIDATES}"
        else:
            within = (
                " that the filter lets through"
                if query.filter != _without_exclusions(PairFilter(), query.filter)
                else ""
            )
            why = f"no other pair{within} {' or '.join(self._what_others_lack())}"
        return f"asked for {query.k}, found {num_found}: {why}" + (f"; left out: {also}" if also else "")

    def _what_others_lack(self) -> list[str]:
        lacks = []
        if Method.BM25 in self._legs and self._understood is not None:
            words = ", ".join((self._understood.entity, *self._understood.details))
            lacks.append(f"shares a word with {words!r}")
        return [*lacks, "has an embedding"] if Method.CLIP in self._legs else lacks

    def _num_excluded(self) -> int:
        """How many pairs would have been found as well. Only asked where too few are found: the legs are at their end."""
        legs = list(self._legs.values())
        within = _without_exclusions(self._query.filter, PairFilter())
        if all(leg.filter == within or leg.is_cut for leg in legs):
            return 0
        without = set[str]().union(*(leg.ids_without_exclusions(within) for leg in legs))
        return len(without - set[str]().union(*(leg.found_ids for leg in legs)))


def _without_exclusions(filter: PairFilter, exclusions: PairFilter) -> PairFilter:
    """`filter` with the exclusions of the other."""
    return replace(
        filter,
        excluded_pair_ids=exclusions.excluded_pair_ids,
        excluded_contents=exclusions.excluded_contents,
        excluded_names=exclusions.excluded_names,
    )


def _needs_prompt(query: Query) -> bool:
    return query.method is not Method.CLIP or bool(query.prompt.strip())


def _reason(error: Exception) -> str:
    return error.description if isinstance(error, ServiceError) else f"internal error ({type(error).__name__})"
