"""What a search chooses from: the candidates of its legs, alone or fused by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from retrieval_svc.fusion import reciprocal_rank_fusion
from retrieval_svc.legs import Candidate, content_of
from retrieval_svc.pairs import Brief, StoredPair
from retrieval_svc.retrieval import LegScore, Method


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result before its picture is read."""

    pair: StoredPair
    score: float
    legs: Mapping[Method, LegScore]


class Ranked(NamedTuple):
    """A pair with its score and its places in the legs, from 0; many more are made than are given back."""

    pair: StoredPair | Brief
    score: float
    places: Mapping[Method, int]

    def found(self, pair: StoredPair, rankings: Mapping[Method, Sequence[Candidate]]) -> Found:
        """What is given back."""
        legs = {m: LegScore(score=rankings[m][place].score, rank=place + 1) for m, place in self.places.items()}
        return Found(pair=pair, score=self.score, legs=legs)


def alone(rankings: Mapping[Method, Sequence[Candidate]]) -> dict[str, Ranked]:
    """The ranking of the only leg."""
    ((method, ranking),) = rankings.items()
    return {s.pair.pair_id: Ranked(s.pair, s.score, {method: place}) for place, s in enumerate(ranking)}


def fused(rankings: Mapping[Method, Sequence[Candidate]]) -> dict[str, Ranked]:
    """Reciprocal-rank fusion by picture: two ids of one picture are one, named by the id that ranks better."""
    best: dict[str, tuple[int, StoredPair | Brief]] = {}
    places: dict[str, dict[Method, int]] = {}
    contents = {method: [content_of(scored.pair) for scored in ranking] for method, ranking in rankings.items()}
    for method, ranking in rankings.items():
        for place, (content, scored) in enumerate(zip(contents[method], ranking, strict=True)):
            places.setdefault(content, {})[method] = place
            if content not in best or place < best[content][0]:
                best[content] = (place, scored.pair)
    named = {pair.pair_id: content for content, (_, pair) in best.items()}
    fused = reciprocal_rank_fusion([[best[content][1].pair_id for content in leg] for leg in contents.values()])
    return {pair_id: Ranked(best[named[pair_id]][1], score, places[named[pair_id]]) for pair_id, score in fused}
