"""Noise schedules as log signal-to-noise ratios: log_snr(t) = log(alpha_t^2 / sigma_t^2), t in [0, 1], alpha^2 + sigma^2 = 1.

A schedule is a pure function of time; training and sampling take it from the same `StageSpec`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

ScheduleKind = Literal["cosine", "linear"]
SCHEDULES: tuple[ScheduleKind, ...] = ("cosine", "linear")
LOG_SNR_MAX = 12.0  # t = 0: sigma = 0.0025, under half a level of uint8
LOG_SNR_MIN = -12.0  # t = 1: alpha = 0.0025


def log_snr(kind: ScheduleKind, t: Any) -> Any:
    """log-SNR at times `t` (any shape), float64: of NumPy or numbers as an array, of torch as a tensor where `t` lies.

    cosine: -2 log tan(pi t / 2), rescaled to end at the two bounds (Salimans & Ho 2022, appendix A).
    linear: the continuous limit of DDPM's linear betas, -log(exp(1e-4 + 10 t^2) - 1) (Kingma et al. 2021, equation 41).

    Raises:
        ValueError: `kind` is no schedule.
    """
    t = t.double() if hasattr(t, "double") else np.asarray(t, np.float64)
    if kind == "cosine":
        first, last = math.atan(math.exp(-LOG_SNR_MAX / 2)), math.atan(math.exp(-LOG_SNR_MIN / 2))
        return -2.0 * _each("log", _each("tan", first + t * (last - first)))
    if kind == "linear":
        return (-_each("log", _each("expm1", 1e-4 + 10.0 * t**2))).clip(LOG_SNR_MIN, LOG_SNR_MAX)
    raise ValueError(f"schedule: {kind!r} is not one of {SCHEDULES}")


def alpha_sigma(log_snr_t: Any) -> tuple[Any, Any]:
    """(alpha, sigma) of a log-SNR, NumPy or torch: alpha^2 = sigmoid(log_snr), sigma^2 = sigmoid(-log_snr)."""
    snr = _each("exp", log_snr_t)
    return (snr / (1.0 + snr)) ** 0.5, (1.0 / (1.0 + snr)) ** 0.5


def _each(name: str, x: Any) -> Any:
    """A function of each element, by its name, of torch or of NumPy."""
    return getattr(x, name)() if hasattr(x, name) else getattr(np, name)(x)
