"""Rankings made of other rankings: reciprocal-rank fusion, near-duplicate removal, maximal marginal relevance. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from retrieval_svc.retrieval import RRF_CONSTANT

_ROUNDING = 1e-6  # two unit vectors of float32 that are one and the same differ from cosine 1 by so much


def reciprocal_rank_fusion(legs: Sequence[Sequence[str]], *, constant: int = RRF_CONSTANT) -> list[tuple[str, float]]:
    """Score(d) = sum over legs of 1 / (constant + rank of d in the leg), best first.

    Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet", SIGIR 2009, section 2.

    Args:
        legs: each a ranking of pair ids, best first, none of them twice; ranks count from 1.
        constant: how little the first ranks stand out.

    Returns:
        (pair id, score); equal scores are ordered by a hash of the id, which is kind to no source.
    """
    scores: dict[str, float] = {}
    for leg in legs:
        for rank, pair_id in enumerate(leg, start=1):
            scores[pair_id] = scores.get(pair_id, 0.0) + 1.0 / (constant + rank)
    return sorted(scores.items(), key=lambda scored: (-scored[1], tie_break(scored[0])))


def tie_break(pair_id: str) -> bytes:
    """Orders pairs whose scores are equal."""
    return hashlib.sha256(pair_id.encode()).digest()


def without_near_duplicates(
    pair_ids: Sequence[str], embeddings: Mapping[str, np.ndarray], *, similarity: float, limit: int
) -> tuple[list[str], int]:
    """Keep the first of every group of pairs that look alike.

    Args:
        pair_ids: best first.
        embeddings: unit vectors [D]; a pair without one is like no other.
        similarity: cosine from which a pair is a duplicate of a better one that was kept.
        limit: stop when so many are kept.

    Returns:
        The kept ids in their order, and how many before the last of them were left out.
    """
    kept: list[str] = []
    seen = np.empty((min(limit, len(pair_ids)), _size(embeddings)), np.float32)  # [at most limit, D]
    num_seen = num_left_out = 0
    for pair_id in pair_ids:
        if len(kept) == limit:
            break
        vector = embeddings.get(pair_id)
        if vector is not None:
            if num_seen and float(np.max(seen[:num_seen] @ vector)) >= similarity - _ROUNDING:
                num_left_out += 1
                continue
            seen[num_seen] = vector
            num_seen += 1
        kept.append(pair_id)
    return kept, num_left_out


def maximal_marginal_relevance(
    pair_ids: Sequence[str], embeddings: Mapping[str, np.ndarray], *, diversity: float, k: int
) -> list[str]:
    """Choose k pairs one by one, each relevant and unlike those chosen before it.

    MMR = argmax over the rest of (1 - diversity) * relevance - diversity * (greatest similarity to a chosen one):
    Carbonell and Goldstein, SIGIR 1998, with lambda = 1 - diversity. The relevance of the i-th of n candidates is
    1 - (i - 1) / n whatever the method, because BM25, cosine and fused scores have no common scale.

    Args:
        pair_ids: candidates, best first.
        embeddings: unit vectors [D]; a pair without one is unlike all others.
        diversity: 0 keeps the order, 1 looks at nothing but unlikeness.
        k: how many.
    """
    num = len(pair_ids)
    if diversity == 0.0 or num == 0:
        return list(pair_ids[:k])
    none = np.zeros(_size(embeddings), np.float32)
    matrix = np.stack([embeddings.get(pair_id, none) for pair_id in pair_ids])  # [N, D]
    relevance = 1.0 - np.arange(num) / num
    likeness = np.full(num, -np.inf)  # greatest similarity to a chosen pair
    chosen: list[int] = []
    while len(chosen) < min(k, num):
        penalty = likeness if chosen else np.zeros(num)
        marginal = (1.0 - diversity) * relevance - diversity * penalty
        marginal[chosen] = -np.inf
        best = int(np.argmax(marginal))  # the first of equals: the more relevant
        chosen.append(best)
        likeness = np.maximum(likeness, matrix @ matrix[best])
    return [pair_ids[i] for i in chosen]


def _size(embeddings: Mapping[str, np.ndarray]) -> int:
    return next((len(vector) for vector in embeddings.values()), 1)
