"""Samplers as tables of linear coefficients, and the loop that runs a table with any denoiser.

Every sampler here makes one step by   x_s = a x_t + b x0_t + c x0_previous + d z,   z ~ N(0, I).
The numbers a, b, c, d depend on times alone, so a trajectory is a table: rows of different trajectories, samplers and
lengths can share one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.diffusion.guidance import mix
from common.diffusion.parameterization import Prediction, to_x0
from common.diffusion.schedule import alpha_sigma
from common.diffusion.threshold import Thresholding, threshold

Sampler = Literal["ddpm", "ddim", "dpmpp_2m"]
SAMPLERS: tuple[Sampler, ...] = ("ddpm", "ddim", "dpmpp_2m")
LOWER_ORDER_UNDER = 15  # DPM-Solver++ makes its last step at first order when it has fewer steps than this


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """A trajectory of N steps.

    Attributes:
        log_snr: of x_t at the start of each step [N].
        alpha, sigma: of the same [N].
        a, b, c, d: coefficients of x_t, x0, the step before's x0, and fresh noise [N].
        guidance: coefficient rows [N, 4].
    """

    log_snr: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray
    guidance: np.ndarray

    def __len__(self) -> int:
        return len(self.log_snr)


def step_coefficients(sampler: Sampler, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """The rows (a, b, c, d) of a sampler.

    ddpm: the ancestral posterior (Ho et al. 2020, equation 7, small variance).
    ddim: the deterministic step (Song et al. 2021, equation 12 at eta = 0).
    dpmpp_2m: DPM-Solver++(2M), data prediction (Lu et al. 2022, algorithm 2), first order at its ends.

    Args:
        sampler: which.
        alpha, sigma: at the N + 1 times of the trajectory, from noise to picture; the last may be (1, 0).

    Returns:
        float64 [N, 4].

    Raises:
        ValueError: `sampler` is none of these.
    """
    rows = np.zeros((len(alpha) - 1, 4))
    for i in range(len(rows)):
        a_t, s_t, a_s, s_s = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        if sampler == "ddim":
            rows[i, :2] = s_s / s_t, a_s - a_t * s_s / s_t
        elif sampler == "ddpm":
            # q(x_s | x_t, x0) with alpha_ts = a_t / a_s and beta = 1 - alpha_ts^2 (1 - sigma_t^2 = alpha_t^2).
            alpha_ts = a_t / a_s
            beta = s_t**2 - alpha_ts**2 * s_s**2
            rows[i, 0] = alpha_ts * s_s**2 / s_t**2
            rows[i, 1] = a_s * beta / s_t**2
            rows[i, 3] = np.sqrt(max(beta, 0.0)) * s_s / s_t
        elif sampler == "dpmpp_2m":
            rows[i] = _dpmpp_2m_row(i, alpha, sigma)
        else:
            raise ValueError(f"sampler: {sampler!r} is not one of {SAMPLERS}")
    return rows


def _dpmpp_2m_row(i: int, alpha: np.ndarray, sigma: np.ndarray) -> tuple[float, float, float, float]:
    num_steps = len(alpha) - 1
    a_t, s_t, a_s, s_s = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
    scale = a_s - a_t * s_s / s_t  # -alpha_s (exp(-h) - 1): h = log(a_s s_t / (a_t s_s)), finite even where s_s = 0
    last = i == num_steps - 1 and (num_steps < LOWER_ORDER_UNDER or s_s == 0.0)
    if i == 0 or last:
        return s_s / s_t, scale, 0.0, 0.0
    h = np.log(a_s / s_s) - np.log(a_t / s_t)
    h_before = np.log(a_t / s_t) - np.log(alpha[i - 1] / sigma[i - 1])
    half_inverse_r = h / (2.0 * h_before)
    return s_s / s_t, scale * (1.0 + half_inverse_r), -scale * half_inverse_r, 0.0


def make_table(sampler: Sampler, log_snr: np.ndarray, guidance: np.ndarray) -> StepTable:
    """Table of the trajectory through `log_snr` [N], then to the clean picture (alpha 1, sigma 0)."""
    alpha, sigma = alpha_sigma(np.asarray(log_snr, np.float64))
    rows = step_coefficients(sampler, np.append(alpha, 1.0), np.append(sigma, 0.0))
    a, b, c, d = rows.T
    return StepTable(log_snr=np.asarray(log_snr), alpha=alpha, sigma=sigma, a=a, b=b, c=c, d=d, guidance=guidance)


def advance(
    table: StepTable,
    step: int,
    x_t: Any,
    x0_before: Any,
    predictions: dict[int, Any],
    *,
    prediction: Prediction,
    thresholding: Thresholding,
    noise: Callable[[], Any],
) -> tuple[Any, Any]:
    """One step of one sample: (x_s, x0), each [C, H, W].

    Args:
        x0_before: the x0 of the step before (ignored at step 0).
        predictions: what the network said, by guidance column.
        noise: draws z of the sample's shape; called only where the table asks for noise.
    """
    said = mix(predictions, table.guidance[step])
    x0 = to_x0(prediction, said, x_t, float(table.alpha[step]), float(table.sigma[step]))
    x0 = threshold(thresholding, x0)
    x_s = float(table.a[step]) * x_t + float(table.b[step]) * x0
    if table.c[step]:
        x_s = x_s + float(table.c[step]) * x0_before
    if table.d[step]:
        x_s = x_s + float(table.d[step]) * noise()
    return x_s, x0


Denoiser = Callable[[Any, float, tuple[int, ...]], dict[int, Any]]
"""(x_t, log_snr, guidance columns) -> the prediction under each column."""


def trajectory(
    denoise: Denoiser,
    table: StepTable,
    x_start: Any,
    *,
    prediction: Prediction,
    thresholding: Thresholding,
    noise: Callable[[], Any],
) -> Iterator[tuple[int, Any, Any]]:
    """Run a table with any denoiser, one sample: yields (step, x_s, x0) after each step; the last x_s is the picture."""
    x_t, x0 = x_start, x_start
    for step in range(len(table)):
        columns = tuple(int(c) for c in np.flatnonzero(table.guidance[step]))
        said = denoise(x_t, float(table.log_snr[step]), columns)
        x_t, x0 = advance(table, step, x_t, x0, said, prediction=prediction, thresholding=thresholding, noise=noise)
        yield step, x_t, x0
