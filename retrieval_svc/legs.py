"""A leg of a search: the candidates of one index, best first, every picture once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from retrieval_svc.pairs import Brief, PairFilter, Scored, ScoredBrief, StoredPair

SPARE = 4  # candidates beyond those that are wanted, for the usual duplicate
GROWTH = 4  # so many times as far goes the next look
MAX_CANDIDATES = 4096  # nobody looks further than this, whatever falls out

Candidate = Scored | ScoredBrief
IsCurrent = Callable[[StoredPair | Brief], bool]
Fetch = Callable[[int, PairFilter, bool], Sequence[Candidate]]  # limit, filter, whether all pairs are compared


@dataclass(kw_only=True)
class Leg:
    """One leg's candidates, best first, every picture once; asked for more, it looks further."""

    fetch: Fetch
    filter: PairFilter
    is_current: IsCurrent
    unique: list[Candidate] = field(default_factory=list)
    found_ids: set[str] = field(default_factory=set)
    num_duplicates: int = 0
    limit: int = 0
    is_exact: bool = False
    is_exhausted: bool = False
    is_cut: bool = False
    elapsed_s: float = 0.0  # in the index, all looks together

    def reach(self, depth: int) -> list[Candidate]:
        """The best `depth` candidates; fewer at the end."""
        while len(self.unique) < depth and not self.is_exhausted:
            self.limit = min(MAX_CANDIDATES, max(depth + SPARE, self.limit * GROWTH))
            found = self._look()
            self.is_cut = len(found) >= self.limit >= MAX_CANDIDATES
            self.is_exhausted = self.is_cut or len(found) < self.limit
            self._take(found)
        return self.unique[:depth]

    def look_exactly(self) -> None:
        """Begin again, and miss nothing."""
        self.is_exact, self.is_exhausted, self.limit, self.unique = True, False, 0, []

    def look_again(self) -> None:
        """Begin again: what was found has changed meanwhile."""
        self.is_exhausted, self.limit, self.unique = False, 0, []

    def ids_without_exclusions(self, within: PairFilter) -> set[str]:
        """What would be found if nothing were excluded."""
        return {s.pair.pair_id for s in self.fetch(MAX_CANDIDATES, within, self.is_exact) if self.is_current(s.pair)}

    def _look(self) -> Sequence[Candidate]:
        started = time.perf_counter()
        try:
            return self.fetch(self.limit, self.filter, self.is_exact)
        finally:
            self.elapsed_s += time.perf_counter() - started

    def _take(self, found: Sequence[Candidate]) -> None:
        current = [scored for scored in found if self.is_current(scored.pair)]
        by_content: dict[str, Candidate] = {}
        for scored in current:
            by_content.setdefault(content_of(scored.pair), scored)
        self.unique = list(by_content.values())
        self.found_ids = {scored.pair.pair_id for scored in current}
        self.num_duplicates = len(current) - len(self.unique)


def content_of(pair: StoredPair | Brief) -> str:
    """What makes two pairs duplicates."""
    return pair.content or pair.pair_id
