"""What a network predicts (x0, eps or v) and how each follows from another.

x_t = alpha x0 + sigma eps;   v = alpha eps - sigma x0 (Salimans & Ho 2022, equation 10).
Written with operators only: the same lines run on NumPy arrays and on torch tensors.
"""

from __future__ import annotations

from typing import Any, Literal

Prediction = Literal["x0", "eps", "v"]
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v")


def diffuse(x0: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
    """x_t = alpha x0 + sigma eps."""
    return alpha * x0 + sigma * eps


def target(kind: Prediction, x0: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
    """What a network of this kind should say."""
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x0
    raise ValueError(f"prediction: {kind!r} is not one of {PREDICTIONS}")


def to_x0(kind: Prediction, prediction: Any, x_t: Any, alpha: Any, sigma: Any) -> Any:
    """x0 from a prediction of any kind: v gives x0 = alpha x_t - sigma v, eps gives (x_t - sigma eps) / alpha."""
    if kind == "x0":
        return prediction
    if kind == "eps":
        return (x_t - sigma * prediction) / alpha
    if kind == "v":
        return alpha * x_t - sigma * prediction
    raise ValueError(f"prediction: {kind!r} is not one of {PREDICTIONS}")


def loss_weight(kind: Prediction, snr: Any, gamma: float) -> Any:
    """Weight of the squared error of a `kind` prediction so that x0 is weighed by min(SNR + 1, gamma).

    SNR + 1 is the weight that v-prediction implies (Salimans & Ho 2022, section 4); the cap is that of Min-SNR (Hang
    et al. 2023, equation 7). Unlike min(SNR, gamma) it keeps weight 1 at high noise, where neighbors decide the shape.
    """
    weight = snr + 1.0
    weight = weight - _relu(weight - gamma)
    if kind == "x0":
        return weight
    if kind == "eps":
        return weight / snr  # |eps error|^2 = SNR |x0 error|^2
    if kind == "v":
        return weight / (snr + 1.0)  # |v error|^2 = (SNR + 1) |x0 error|^2
    raise ValueError(f"prediction: {kind!r} is not one of {PREDICTIONS}")


def _relu(x: Any) -> Any:
    return (x + abs(x)) / 2.0
