"""Schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.diffusion.schedule import LOG_SNR_MAX, LOG_SNR_MIN, SCHEDULES, ScheduleKind, alpha_sigma, log_snr


def test_cosine_in_the_middle_is_the_plain_cosine() -> None:
    """Away from its two rescaled ends, alpha_t = cos(pi t / 2)."""
    t = np.linspace(0.1, 0.9, 17)
    alpha, sigma = alpha_sigma(log_snr("cosine", t))
    np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=3e-3)
    np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=3e-3)


def test_cosine_closed_form_and_ends() -> None:
    """Between its ends the angle atan(sigma / alpha) grows linearly."""
    t = np.linspace(0.0, 1.0, 101)
    alpha, sigma = alpha_sigma(log_snr("cosine", t))
    angle = np.arctan2(sigma, alpha)
    np.testing.assert_allclose(np.diff(angle), np.diff(angle)[0], rtol=1e-9)
    assert float(log_snr("cosine", 0.0)) == pytest.approx(12.0, abs=1e-9)
    assert float(log_snr("cosine", 1.0)) == pytest.approx(-12.0, abs=1e-9)
    assert float(log_snr("cosine", 0.5)) == pytest.approx(0.0, abs=1e-12)


def test_linear_is_the_limit_of_ddpm_betas() -> None:
    """alpha^2(t) is the product of 1 - beta over DDPM's thousand linear betas up to t, in the limit of many."""
    num = 100_000
    betas = np.linspace(0.1, 20.0, num) / num
    products = np.cumprod(1.0 - betas)
    for t in (0.05, 0.25, 0.5, 0.75, 0.9):
        alpha, _ = alpha_sigma(log_snr("linear", t))
        # Kingma et al. (equation 41) write 1e-4 + 10 t^2 for the exact 0.1 t + 9.95 t^2.
        assert 2 * math.log(alpha) == pytest.approx(math.log(products[int(t * num) - 1]), rel=0.08, abs=0.01)


def test_linear_by_hand() -> None:
    for t in (0.0, 0.1, 0.5, 0.9):
        alpha_squared = math.exp(-(1e-4 + 10 * t * t))
        alpha, sigma = alpha_sigma(log_snr("linear", t))
        assert float(alpha) ** 2 == pytest.approx(alpha_squared, rel=1e-9)
        assert float(sigma) ** 2 == pytest.approx(1 - alpha_squared, rel=1e-9)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_noise_only_grows_within_bounds(kind: ScheduleKind) -> None:
    values = log_snr(kind, np.linspace(0.0, 1.0, 1001))
    assert (np.diff(values) < 0).all()
    assert values.max() <= LOG_SNR_MAX + 1e-9
    assert values.min() >= LOG_SNR_MIN - 1e-9
    assert values.dtype == np.float64
    assert log_snr(kind, np.zeros((2, 3))).shape == (2, 3)


def test_alpha_sigma_are_on_the_circle_and_same_in_torch() -> None:
    values = np.linspace(LOG_SNR_MIN, LOG_SNR_MAX, 49)
    alpha, sigma = alpha_sigma(values)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.log(alpha**2 / sigma**2), values, rtol=1e-9, atol=1e-9)
    in_torch = alpha_sigma(torch.from_numpy(values))
    np.testing.assert_allclose(in_torch[0].numpy(), alpha, rtol=1e-14)
    np.testing.assert_allclose(in_torch[1].numpy(), sigma, rtol=1e-14)
    in_float32 = alpha_sigma(torch.from_numpy(values).float())
    np.testing.assert_allclose(in_float32[1].numpy(), sigma, rtol=1e-5)
    assert [float(x) for x in alpha_sigma(0.0)] == pytest.approx([math.sqrt(0.5)] * 2)


def test_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule: 'sigmoid'"):
        log_snr("sigmoid", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_torch_reads_the_same_schedule(kind: ScheduleKind) -> None:
    t = np.linspace(0.0, 1.0, 101)
    values = log_snr(kind, torch.from_numpy(t.astype(np.float32)))
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values.numpy(), log_snr(kind, t.astype(np.float32)), rtol=1e-12, atol=1e-12)
