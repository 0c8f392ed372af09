"""The guidance table against numbers worked out by hand from Re-Imagen, equation 6 and appendix E."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.guidance import (
    BRANCHES,
    MAX_WEIGHT,
    STRATEGIES,
    Guidance,
    Strategy,
    coefficients,
    leaves_text_out,
    mix,
)
from common.diffusion.parameterization import diffuse, target, to_x0

WEIGHTS = st.floats(0.0, MAX_WEIGHT)
GUIDANCES = st.builds(
    Guidance,
    strategy=st.sampled_from(STRATEGIES),
    text_weight=WEIGHTS,
    neighbor_weight=WEIGHTS,
    eta=st.floats(0.0, 1.0),
)


def guidance(**changes: Any) -> Guidance:
    return Guidance(**({"strategy": "interleaved", "text_weight": 30.0, "neighbor_weight": 5.0, "eta": 0.5} | changes))


def test_columns_are_full_neighbors_text_none() -> None:
    assert BRANCHES == ((True, True), (False, True), (True, False), (False, False))


def test_interleaved_by_hand() -> None:
    """w_p = 30: 30 eps(full) - 29 eps(neighbors only); w_n = 5: 5 eps(full) - 4 eps(text only). R < eta is a text step."""
    rows = coefficients(guidance(), np.array([0.0, 0.499999, 0.5, 0.999]))
    text, neighbor = [30.0, -29.0, 0.0, 0.0], [5.0, 0.0, -4.0, 0.0]
    np.testing.assert_array_equal(rows, [text, text, neighbor, neighbor])


def test_interleaved_at_the_ends_of_eta() -> None:
    draws = np.array([0.0, 0.3, 0.9999999])
    assert (coefficients(guidance(eta=0.0), draws)[:, 2] == -4.0).all(), "eta = 0: every step is a neighbor step"
    assert (coefficients(guidance(eta=1.0), draws)[:, 1] == -29.0).all(), "eta = 1: every step is a text step"


def test_weighted_by_hand() -> None:
    """eta = 0.25, w_p = 30, w_n = 5: 7.5 + 3.75 = 11.25; -0.25 * 29 = -7.25; -0.75 * 4 = -3."""
    rows = coefficients(guidance(strategy="weighted", eta=0.25), np.array([0.1, 0.9]))
    np.testing.assert_allclose(rows, [[11.25, -7.25, -3.0, 0.0]] * 2, rtol=1e-15)


def test_joint_by_hand() -> None:
    """Plain guidance: 7.5 eps(full) - 6.5 eps(none), whatever the neighbor weight, eta and the draws."""
    rows = coefficients(
        guidance(strategy="joint", text_weight=7.5, neighbor_weight=99.0, eta=0.1), np.array([0.0, 0.9])
    )
    np.testing.assert_allclose(rows, [[7.5, 0.0, 0.0, -6.5]] * 2, rtol=1e-15)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weight_one_is_the_full_condition_alone(strategy: Any) -> None:
    rows = coefficients(guidance(strategy=strategy, text_weight=1.0, neighbor_weight=1.0), np.array([0.2, 0.8]))
    np.testing.assert_array_equal(rows, [[1.0, 0.0, 0.0, 0.0]] * 2)


@given(GUIDANCES, st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=8))
def test_rows_sum_to_one(drawn: Guidance, draws: list[float]) -> None:
    rows = coefficients(drawn, np.array(draws))
    assert rows.shape == (len(draws), 4)
    np.testing.assert_allclose(rows.sum(1), 1.0, atol=1e-9)
    if drawn.strategy == "interleaved":
        assert ((rows != 0).sum(1) <= 2).all(), "two passes a step"


@given(GUIDANCES, st.floats(-4.0, 4.0))
def test_mixing_eps_v_or_x0_is_the_same(drawn: Guidance, log_snr: float) -> None:
    alpha, sigma = (1 / (1 + np.exp(-log_snr))) ** 0.5, (1 / (1 + np.exp(log_snr))) ** 0.5
    rng = np.random.default_rng(3)
    x_t = diffuse(rng.standard_normal(6), rng.standard_normal(6), alpha, sigma)
    pictures = {c: rng.standard_normal(6) for c in range(4)}
    for row in coefficients(drawn, np.array([0.1, 0.9])):
        expected = sum(row[c] * pictures[c] for c in range(4))
        for kind in ("eps", "v", "x0"):
            noises = {c: (x_t - alpha * pictures[c]) / sigma for c in range(4)}
            said = {c: target(kind, pictures[c], noises[c], alpha, sigma) for c in range(4)}
            np.testing.assert_allclose(to_x0(kind, mix(said, row), x_t, alpha, sigma), expected, rtol=1e-6, atol=1e-6)


def test_mix_reads_only_columns_that_were_run() -> None:
    row = np.array([30.0, -29.0, 0.0, 0.0])
    np.testing.assert_allclose(mix({0: np.array([1.0]), 1: np.array([0.5])}, row), [15.5])
    with pytest.raises(KeyError):
        mix({0: np.array([1.0])}, row)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strategy", "mixed"),
        ("text_weight", -0.1),
        ("text_weight", 100.5),
        ("neighbor_weight", float("nan")),
        ("neighbor_weight", float("inf")),
        ("eta", 1.01),
        ("eta", float("nan")),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"guidance\.{name}: .*{value!s}"):
        guidance(**{name: value})


@pytest.mark.parametrize(
    ("strategy", "text_weight", "eta", "expected"),
    [
        ("joint", 1.0, 0.5, False),
        ("joint", 2.0, 0.5, True),
        ("weighted", 2.0, 0.5, True),
        ("weighted", 1.0, 0.5, False),
        ("weighted", 2.0, 0.0, False),
        ("interleaved", 2.0, 0.001, True),
        ("interleaved", 2.0, 0.0, False),
        ("interleaved", 2.0, 1.0, True),
        ("interleaved", 1.0, 0.5, False),
    ],
)
def test_whether_guidance_ever_leaves_the_text_out(
    strategy: Strategy, text_weight: float, eta: float, expected: bool
) -> None:
    guidance = Guidance(strategy=strategy, text_weight=text_weight, neighbor_weight=3.0, eta=eta)
    assert leaves_text_out(guidance) == expected
