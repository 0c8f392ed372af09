"""What the neighbors of a corpus look like: scores, hubs, how many pairs have none, how often the entity is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.knn_shards import Asked, Header, Neighborhoods

QUANTILES = (0, 1, 10, 50, 90, 99, 100)
NUM_HUBS = 20
NUM_REASONS = 10


class Statistics:
    """Grows shard by shard; 12 bytes a pair.

    Attributes:
        best, worst: scores of each pair's first and last neighbor, of the pairs that have one, by shard.
        occurrences: how often each pair is a neighbor [num_pairs].
        having: pairs by their number of neighbors [k + 1].
        same_by_rank, known_by_rank: neighbors of the pair's own entity, and neighbors of pairs whose entity is known [k].
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.best: list[np.ndarray] = []
        self.worst: list[np.ndarray] = []
        self.occurrences = np.zeros(asked.num_pairs, np.int32)
        self.having = np.zeros(asked.k + 1, np.int64)
        self.same_by_rank = np.zeros(asked.k, np.int64)
        self.known_by_rank = np.zeros(asked.k, np.int64)
        self.dropped: Counter[str] = Counter()
        self.num_neighbors = self.num_refused = self.num_known = self.num_with_same = 0

    def add(
        self,
        kept: np.ndarray,
        scores: np.ndarray,
        same: np.ndarray,
        known: np.ndarray,
        shard: Neighborhoods,
        dropped: dict[str, int],
    ) -> None:
        """Count a shard.

        Args:
            kept: rows of the neighbors, -1 where there are fewer [n, k]; scores: theirs [n, k].
            same: whether a neighbor shows the pair's own entity [n, k].
            known: whether the pair's entity is known [n].
            dropped: neighbors left out, by the reason.
        """
        there = kept >= 0
        counts = there.sum(1)
        some = counts > 0
        self.best.append(scores[some, 0].astype(np.float32))
        self.worst.append(np.take_along_axis(scores, np.maximum(counts - 1, 0)[:, None], 1)[some, 0].astype(np.float32))
        self.occurrences += np.bincount(kept[there], minlength=self.asked.num_pairs).astype(np.int32)
        self.having += np.bincount(counts, minlength=self.asked.k + 1)
        self.same_by_rank += same.sum(0)
        self.known_by_rank += (there & known[:, None]).sum(0)
        self.dropped.update(dropped)
        self.num_neighbors += int(there.sum())
        self.num_refused += int(shard.refused.sum())
        self.num_known += int(known.sum())
        self.num_with_same += int(same.any(1).sum())

    def figures(
        self, headers: Sequence[Header], names_of: Callable[[list[int]], dict[int, tuple[str, str]]]
    ) -> dict[str, Any]:
        """Everything as plain numbers; `names_of` gives (pair id, caption) of rows."""
        num, asked = self.asked.num_pairs, self.asked
        reasons = dict(item for header in headers for item in header.reasons.items())
        seconds = sum(header.seconds for header in headers)
        return {
            "pairs": num,
            "method": asked.method,
            "k": asked.k,
            "mean_neighbors": round(self.num_neighbors / max(num, 1), 4),
            "share_without_neighbors": _share(self.having[0], num),
            "share_of_fewer_than_k": _share(self.having[: asked.k].sum(), num),
            "pairs_by_number_of_neighbors": self.having.tolist(),
            "refused_captions": self.num_refused,
            "refused_examples": dict(list(reasons.items())[:NUM_REASONS]),
            "left_out": dict(self.dropped),
            "best_score": _quantiles(self.best),
            "last_score": _quantiles(self.worst),
            "hubness": self._hubness(names_of),
            "same_entity": self._same_entity(),
            "asking": {
                "shards": asked.num_shards,
                "shard_seconds": round(seconds, 1),
                "pairs_per_s_of_a_shard": round(num / seconds, 1) if seconds else 0.0,
            },
        }

    def _hubness(self, names_of: Callable[[list[int]], dict[int, tuple[str, str]]]) -> dict[str, Any]:
        """k-occurrence N_k: its skewness is the measure of Radovanović et al. 2010 (JMLR 11, section 3)."""
        counts = self.occurrences
        spread = float(counts.std())
        top = [int(row) for row in np.argsort(-counts, kind="stable")[:NUM_HUBS] if counts[row]]
        names = names_of(top)
        return {
            "k_occurrence_skewness": round(float((((counts - counts.mean()) / spread) ** 3).mean()), 4)
            if spread
            else 0.0,
            "k_occurrence_max": int(counts.max(initial=0)),
            "share_never_a_neighbor": _share((counts == 0).sum(), len(counts)),
            "top": [
                {"pair_id": names[row][0], "caption": names[row][1], "k_occurrence": int(counts[row])} for row in top
            ],
        }

    def _same_entity(self) -> dict[str, Any]:
        known, by_rank = int(self.known_by_rank.sum()), (self.same_by_rank.tolist(), self.known_by_rank.tolist())
        if not known:
            return {"pairs_with_entity": self.num_known}
        return {
            "pairs_with_entity": self.num_known,
            "share_of_neighbors": _share(self.same_by_rank.sum(), known),
            "share_of_pairs_with_one": _share(self.num_with_same, self.num_known),
            "share_by_rank": [_share(same, of) for same, of in zip(*by_rank, strict=True)],
        }


def _share(part: float, whole: float) -> float:
    return round(float(part) / float(whole), 5) if whole else 0.0


def _quantiles(parts: list[np.ndarray]) -> dict[str, float]:
    scores = np.concatenate(parts) if parts else np.empty(0)
    if not len(scores):
        return {}
    return {f"p{q}": round(float(v), 4) for q, v in zip(QUANTILES, np.percentile(scores, QUANTILES), strict=True)}
