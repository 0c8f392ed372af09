"""Samplers on denoisers that are known in closed form, and the loop's contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common.diffusion.guidance import Guidance, coefficients
from common.diffusion.parameterization import PREDICTIONS, Prediction, target
from common.diffusion.sampler import SAMPLERS, Sampler, StepTable, make_table, step_coefficients, trajectory
from common.diffusion.schedule import SCHEDULES, ScheduleKind, alpha_sigma, log_snr

MEAN, SPREAD = 0.3, 0.4
ONLY_FULL = Guidance(strategy="joint", text_weight=1.0, neighbor_weight=1.0, eta=1.0)


def table_of(sampler: Sampler, steps: int, schedule: ScheduleKind = "cosine") -> StepTable:
    times = np.linspace(1.0, 0.0, steps + 1)[:-1]
    return make_table(sampler, log_snr(schedule, times), coefficients(ONLY_FULL, np.zeros(steps)))


def gaussian_denoiser(kind: Prediction) -> Callable[[Any, float, tuple[int, ...]], dict[int, Any]]:
    """The best prediction when pictures are N(MEAN, SPREAD^2): E[x0 | x_t] is linear in x_t."""

    def denoise(x_t: Any, log_snr_t: float, columns: tuple[int, ...]) -> dict[int, Any]:
        alpha, sigma = (float(x) for x in alpha_sigma(np.float64(log_snr_t)))
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        return {c: target(kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma) for c in columns}

    return denoise


def run(table: StepTable, x: Any, kind: Prediction = "v", noise: Callable[[], Any] | None = None) -> Any:
    def refused() -> Any:
        raise AssertionError("a deterministic sampler draws no noise")

    steps = trajectory(gaussian_denoiser(kind), table, x, prediction=kind, thresholding="none", noise=noise or refused)
    return list(steps)[-1][1]


def transported(x_start: Any, schedule: ScheduleKind) -> Any:
    """Where the probability-flow ODE takes x_start: each marginal's standard score is kept."""
    alpha, sigma = alpha_sigma(log_snr(schedule, 1.0))
    score = (x_start - alpha * MEAN) / np.sqrt(alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + SPREAD * score


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "error"), [("ddim", 6e-3), ("dpmpp_2m", 5e-4)])
def test_ode_samplers_transport_noise_to_the_gaussian(schedule: ScheduleKind, sampler: Sampler, error: float) -> None:
    x = np.linspace(-3.0, 3.0, 101)
    np.testing.assert_allclose(run(table_of(sampler, 1000, schedule), x), transported(x, schedule), atol=error)


def test_ddim_error_falls_with_steps_at_first_order_and_2m_at_second() -> None:
    x = np.linspace(-2.0, 2.0, 21)
    expected = transported(x, "cosine")

    def error(sampler: Sampler, steps: int) -> float:
        return float(np.abs(run(table_of(sampler, steps), x) - expected).max())

    # Halving the step halves the error of DDIM, and more than thirds that of the second-order solver.
    assert 1.7 < error("ddim", 100) / error("ddim", 200) < 2.4
    assert error("dpmpp_2m", 100) / error("dpmpp_2m", 200) > 2.4
    assert error("dpmpp_2m", 50) < 0.35 * error("ddim", 50)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_sampling_has_the_gaussians_mean_and_spread(schedule: ScheduleKind) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(20_000)
    out = run(table_of("ddpm", 250, schedule), x, noise=lambda: rng.standard_normal(20_000))
    assert out.mean() == pytest.approx(MEAN, abs=0.02)
    assert out.std() == pytest.approx(SPREAD, rel=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_predictions_give_one_trajectory(sampler: Sampler) -> None:
    x = np.linspace(-3.0, 3.0, 31)

    def noise() -> Callable[[], Any]:
        source = np.random.default_rng(4)
        return lambda: source.standard_normal(31)

    outcomes = [run(table_of(sampler, 20), x, kind, noise()) for kind in PREDICTIONS]
    np.testing.assert_allclose(outcomes[1], outcomes[0], atol=1e-7)
    np.testing.assert_allclose(outcomes[2], outcomes[0], atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_torch_and_numpy_run_the_same_lines(sampler: Sampler) -> None:
    x = np.random.default_rng(1).standard_normal((3, 8, 8))
    a, b = np.random.default_rng(2), np.random.default_rng(2)
    in_numpy = run(table_of(sampler, 16), x, noise=lambda: a.standard_normal((3, 8, 8)))
    in_torch = run(
        table_of(sampler, 16), torch.from_numpy(x), noise=lambda: torch.from_numpy(b.standard_normal((3, 8, 8)))
    )
    np.testing.assert_allclose(in_torch.numpy(), in_numpy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_constant_picture_is_kept(sampler: Sampler) -> None:
    """If the denoiser always says one picture, that is where every sampler ends, from any noise."""
    picture = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4))
    steps = trajectory(
        lambda x_t, log_snr_t, columns: dict.fromkeys(columns, picture),
        table_of(sampler, 9),
        np.random.default_rng(1).standard_normal((3, 4, 4)) * 5,
        prediction="x0",
        thresholding="static",
        noise=lambda: np.ones((3, 4, 4)),
    )
    np.testing.assert_allclose(list(steps)[-1][1], picture, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_marginals_are_kept(sampler: Sampler) -> None:
    """A step from the true x_t with the true x0 lands on q(x_s | x0): mean alpha_s x0, variance sigma_s^2."""
    table = table_of(sampler, 12)
    alpha, sigma = np.append(table.alpha, 1.0), np.append(table.sigma, 0.0)
    np.testing.assert_allclose(table.a * table.alpha + table.b, alpha[1:], rtol=1e-12)
    np.testing.assert_allclose((table.a * table.sigma) ** 2 + table.d**2, sigma[1:] ** 2, rtol=1e-9, atol=1e-15)


def test_only_passes_with_weight_are_asked_for() -> None:
    rows = np.array([[1.0, 0.0, 0.0, 0.0], [3.0, -2.0, 0.0, 0.0], [3.0, 0.0, 0.0, -2.0]])
    asked = []

    def denoise(x_t: Any, log_snr_t: float, columns: tuple[int, ...]) -> dict[int, Any]:
        asked.append((round(log_snr_t, 6), columns))
        return dict.fromkeys(columns, x_t)

    table = make_table("ddim", np.array([-3.0, 0.0, 3.0]), rows)
    steps = [s for s, _, _ in trajectory(denoise, table, np.ones(2), prediction="v", thresholding="none", noise=list)]
    assert steps == [0, 1, 2]
    assert asked == [(-3.0, (0,)), (0.0, (0, 1)), (3.0, (0, 3))]


def test_each_sample_is_thresholded_alone_before_the_step() -> None:
    seen = []
    table = make_table("ddim", np.array([-1.0, 1.0]), np.tile([1.0, 0, 0, 0], (2, 1)))
    for _, x_s, x0 in trajectory(
        lambda x_t, log_snr_t, columns: {0: np.full((1, 2, 2), 4.0)},
        table,
        np.zeros((1, 2, 2)),
        prediction="x0",
        thresholding="static",
        noise=list,
    ):
        seen.append((float(x_s[0, 0, 0]), float(x0[0, 0, 0])))
    assert seen[0] == (pytest.approx(table.b[0]), 1.0), "the step starts from the thresholded x0"
    assert seen[1][0] == pytest.approx(1.0)


def test_unknown_sampler_is_named() -> None:
    with pytest.raises(ValueError, match="sampler: 'heun'"):
        step_coefficients("heun", np.array([0.1, 1.0]), np.array([0.9, 0.0]))  # type: ignore[arg-type]
