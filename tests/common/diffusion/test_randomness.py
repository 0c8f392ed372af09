"""Random numbers: pinned, and independent from one purpose, sample, stage and seed to the next."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from common.diffusion.randomness import MAX_SEED, generator, normal

PURPOSES: tuple[Any, ...] = ("start", "steps", "augmentation", "branches")


@pytest.mark.parametrize(
    ("purpose", "expected"),
    [
        ("start", [0.38304609, -0.74897331, 0.87027669]),
        ("steps", [-1.18971741, 0.87046647, -0.50254834]),
        ("augmentation", [-0.20670742, -0.27927148, -0.2235024]),
        ("branches", [-1.10734916, -1.14192069, 0.20953687]),
    ],
)
def test_numbers_are_pinned(purpose: Any, expected: list[float]) -> None:
    """A picture that was promised for a seed stays that picture."""
    np.testing.assert_allclose(normal(generator(7, 64, 0, purpose), (3,)), expected, rtol=1e-6)


def test_the_largest_seed_is_pinned_too() -> None:
    np.testing.assert_allclose(
        normal(generator(2**63 - 1, 1024, 3, "start"), (2,)), [0.16095828, -0.28414443], rtol=1e-6
    )


def test_branches_are_pinned() -> None:
    np.testing.assert_allclose(generator(7, 64, 0, "branches").random(2), [0.5559205868826815, 0.6521354909294662])


def test_streams_are_independent() -> None:
    """No two of (seed, stage, sample, purpose) share numbers, also where the words of one could spill into another."""
    seeds = (0, 1, 7, 64, 64 * 2**32, 1 + 64 * 2**32, 2**32, 2**32 - 1, MAX_SEED)
    names = list(itertools.product(seeds, (64, 256, 1024), (0, 1, 64), PURPOSES))
    streams = np.stack([normal(generator(*name), (16,)) for name in names])
    assert len(np.unique(streams[:, 0])) == len(names)
    correlation = np.corrcoef(streams)
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 0.99
    # Over all pairs the correlation is that of independent draws of length 16: zero on average, 1 / sqrt(15) wide.
    assert np.abs(correlation.mean()) < 0.01
    assert correlation.std() == pytest.approx(1 / np.sqrt(15), rel=0.05)


def test_the_same_name_is_the_same_stream() -> None:
    a, b = generator(3, 64, 1, "steps"), generator(3, 64, 1, "steps")
    np.testing.assert_array_equal(normal(a, (4, 5)), normal(b, (4, 5)))
    np.testing.assert_array_equal(normal(a, (4, 5)), normal(b, (4, 5)))


def test_normal_is_standard_float32_of_the_shape() -> None:
    drawn = normal(generator(0, 64, 0, "start"), (3, 128, 128))
    assert drawn.dtype == np.float32
    assert drawn.shape == (3, 128, 128)
    assert abs(drawn.mean()) < 0.02
    assert drawn.std() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: {seed}"):
        generator(seed, 64, 0, "start")
