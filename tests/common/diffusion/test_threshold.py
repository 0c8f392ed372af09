"""Thresholding, dynamic against np.quantile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.diffusion.threshold import MAX_SAMPLES, QUANTILE, quantile_of_magnitude, threshold


def pictures(side: int, scale: float) -> np.ndarray:
    return np.random.default_rng(side).standard_normal((3, side, side)) * scale


@pytest.mark.parametrize("side", [1, 2, 5, 16, 64, 147])
def test_dynamic_is_the_quantile_of_numpy(side: int) -> None:
    """Up to 147 x 147 x 3 = 64,827 values every value is read."""
    x0 = pictures(side, 3.0)
    s = max(1.0, float(np.quantile(np.abs(x0), 0.995)))
    np.testing.assert_allclose(threshold("dynamic", x0), np.clip(x0, -s, s) / s, rtol=1e-12)
    assert np.abs(threshold("dynamic", x0)).max() <= 1.0


@pytest.mark.parametrize("side", [148, 256, 1024])
def test_strided_sample_is_close_and_bounded(side: int) -> None:
    x0 = pictures(side, 2.0)
    stride = -(-x0.size // MAX_SAMPLES)
    assert stride > 1
    sample = np.abs(x0).reshape(-1)[::stride]
    assert sample.size <= MAX_SAMPLES
    assert quantile_of_magnitude(x0) == pytest.approx(float(np.quantile(sample, QUANTILE)), rel=1e-9)
    assert quantile_of_magnitude(x0) == pytest.approx(float(np.quantile(np.abs(x0), QUANTILE)), rel=0.03)


def test_strided_sample_reads_every_channel() -> None:
    """A saturated last channel must be seen."""
    x0 = np.zeros((3, 1024, 1024))
    x0[2] = 7.0
    assert quantile_of_magnitude(x0) == pytest.approx(7.0)


def test_dynamic_leaves_a_picture_in_range_alone() -> None:
    x0 = np.random.default_rng(0).uniform(-0.9, 0.9, (3, 8, 8))
    np.testing.assert_array_equal(threshold("dynamic", x0), x0)


def test_a_single_wild_value_is_clipped_not_followed() -> None:
    x0 = np.full((3, 32, 32), 0.5)
    x0[0, 0, 0] = 1000.0
    thresholded = threshold("dynamic", x0)
    assert thresholded[0, 0, 0] == 1.0
    assert thresholded[1, 5, 5] == 0.5


def test_static_and_none() -> None:
    x0 = np.array([[[-3.0, -0.5, 0.25, 2.0]]])
    np.testing.assert_array_equal(threshold("static", x0), [[[-1.0, -0.5, 0.25, 1.0]]])
    assert threshold("none", x0) is x0


@pytest.mark.parametrize("kind", ["none", "static", "dynamic"])
def test_torch_and_numpy_agree(kind) -> None:
    x0 = pictures(200, 2.0).astype(np.float32)
    np.testing.assert_allclose(threshold(kind, torch.from_numpy(x0)).numpy(), threshold(kind, x0), rtol=1e-6)


def test_bfloat16_and_gradients_are_read() -> None:
    x0 = torch.from_numpy(pictures(16, 2.0)).bfloat16().requires_grad_()
    assert threshold("dynamic", x0).abs().max() <= 1.0


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="thresholding: 'soft'"):
        threshold("soft", np.zeros((1, 1, 1)))  # type: ignore[arg-type]
