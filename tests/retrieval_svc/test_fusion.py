"""Fusion, near duplicates and diversity: numbers worked out by hand, and oracles that are slow and plain."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_svc.fusion import (
    maximal_marginal_relevance,
    reciprocal_rank_fusion,
    tie_break,
    without_near_duplicates,
)

IDS = [f"p{i}" for i in range(12)]
RANKINGS = st.lists(st.lists(st.sampled_from(IDS), unique=True), max_size=3)


def _vectors(seed: int, num: int, size: int = 3) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).standard_normal((num, size)).astype(np.float32)
    return dict(zip(IDS, drawn / np.linalg.norm(drawn, axis=1, keepdims=True), strict=False))


def test_reciprocal_ranks_by_hand() -> None:
    fused = reciprocal_rank_fusion([["a", "b", "c"], ["c", "a"]])
    assert [pair_id for pair_id, _ in fused] == ["a", "c", "b"]
    assert [score for _, score in fused] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62], abs=1e-15)


def test_one_leg_keeps_its_order_and_no_leg_gives_nothing() -> None:
    assert [i for i, _ in reciprocal_rank_fusion([IDS])] == IDS
    assert reciprocal_rank_fusion([]) == reciprocal_rank_fusion([[], []]) == []


def test_equal_scores_are_ordered_by_the_hash_of_the_id() -> None:
    first = reciprocal_rank_fusion([["x"], ["y"]])
    assert first == reciprocal_rank_fusion([["y"], ["x"]])
    assert [i for i, _ in first] == sorted("xy", key=tie_break)
    assert [i for i, _ in reciprocal_rank_fusion([[i] for i in IDS])] == sorted(IDS, key=tie_break)
    assert sorted(IDS, key=tie_break) != IDS, "the alphabet is no hash"


@given(RANKINGS)
def test_fusion_is_the_sum_over_legs(rankings: list[list[str]]) -> None:
    fused = dict(reciprocal_rank_fusion(rankings))
    for pair_id in IDS:
        ranks = [ranking.index(pair_id) + 1 for ranking in rankings if pair_id in ranking]
        assert (pair_id in fused) == bool(ranks)
        assert math.isclose(fused.get(pair_id, 0.0), math.fsum(1 / (60 + rank) for rank in ranks))
    scores = list(fused.values())
    assert scores == sorted(scores, reverse=True)


def test_near_duplicates_by_hand() -> None:
    vectors = {
        "a": np.array([1, 0], np.float32),
        "b": np.array([0.6, 0.8], np.float32),  # 0.6 to a
        "c": np.array([0, 1], np.float32),  # 0.8 to b
    }
    ids = ["a", "b", "c", "none"]
    assert without_near_duplicates(ids, vectors, similarity=0.61, limit=9) == (["a", "b", "none"], 1)
    assert without_near_duplicates(ids, vectors, similarity=0.6, limit=9) == (["a", "c", "none"], 1)
    assert without_near_duplicates(ids, vectors, similarity=0.9, limit=2) == (["a", "b"], 0)
    assert without_near_duplicates(ids, {}, similarity=0.1, limit=9) == (ids, 0)


def test_equal_vectors_are_near_duplicates_at_similarity_one() -> None:
    vector = np.full(384, 1 / math.sqrt(384), np.float32)
    assert without_near_duplicates(["a", "b"], {"a": vector, "b": vector.copy()}, similarity=1.0, limit=2) == (["a"], 1)


@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.integers(0, 12))
def test_near_duplicates_against_every_pair(seed: int, similarity: float, limit: int) -> None:
    vectors = _vectors(seed, 10)
    kept, num_left_out = without_near_duplicates(IDS, vectors, similarity=similarity, limit=limit)
    expected, left_out = list[str](), 0
    for pair_id in IDS:
        if len(expected) == limit:
            break
        alike = [
            float(vectors[pair_id] @ vectors[other]) for other in expected if pair_id in vectors and other in vectors
        ]
        if any(cosine >= similarity - 1e-6 for cosine in alike):
            left_out += 1
        else:
            expected.append(pair_id)
    assert (kept, num_left_out) == (expected, left_out)


def test_marginal_relevance_by_hand() -> None:
    """Relevance 1, 2/3, 1/3; b is nearly a, c is at right angles to both."""
    vectors = {
        "a": np.array([1, 0], np.float32),
        "b": np.array([0.8, 0.6], np.float32),
        "c": np.array([0, 1], np.float32),
    }
    order = ["a", "b", "c"]
    # After a: b has (1-d) 2/3 - 0.8 d, c has (1-d) 1/3; they are equal at d = 5/17 = 0.294.
    assert maximal_marginal_relevance(order, vectors, diversity=0.29, k=2) == ["a", "b"]
    assert maximal_marginal_relevance(order, vectors, diversity=0.30, k=2) == ["a", "c"]
    assert maximal_marginal_relevance(order, vectors, diversity=0.30, k=9) == ["a", "c", "b"]
    assert maximal_marginal_relevance(order, vectors, diversity=0.0, k=2) == ["a", "b"]


def test_diversity_alone_looks_at_nothing_else() -> None:
    vectors = {i: v for i, v in zip("abc", np.array([[1, 0], [0.99, 0.14], [-1, 0]], np.float32), strict=True)}
    assert maximal_marginal_relevance(["a", "b", "c"], vectors, diversity=1.0, k=2) == ["a", "c"]
    assert maximal_marginal_relevance([], vectors, diversity=1.0, k=2) == []


@given(st.integers(0, 10_000), st.floats(0.01, 0.99), st.integers(1, 12))
def test_marginal_relevance_against_the_definition(seed: int, diversity: float, k: int) -> None:
    ids = random.Random(seed).sample(IDS, len(IDS))
    vectors = _vectors(seed, 10)  # the last two have none
    chosen: list[str] = []
    for _ in range(min(k, len(ids))):

        def marginal(pair_id: str, before: tuple[str, ...] = tuple(chosen)) -> float:
            cosines = [
                float(vectors[pair_id].astype(np.float64) @ vectors[other])
                if {pair_id, other} <= vectors.keys()
                else 0.0
                for other in before
            ]
            relevance = 1 - ids.index(pair_id) / len(ids)
            return (1 - diversity) * relevance - diversity * max(cosines, default=0.0)

        chosen.append(max((i for i in ids if i not in chosen), key=marginal))
    assert maximal_marginal_relevance(ids, vectors, diversity=diversity, k=k) == chosen


def test_nothing_comes_twice() -> None:
    vectors = _vectors(3, 12)
    for diversity, k in itertools.product((0.0, 0.5, 1.0), (1, 5, 12, 30)):
        chosen = maximal_marginal_relevance(IDS, vectors, diversity=diversity, k=k)
        assert len(chosen) == len(set(chosen)) == min(k, 12)
