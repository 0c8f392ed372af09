"""Keeping x0 in range: static clipping, or dynamic thresholding (Imagen, section 2.3)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Thresholding = Literal["none", "static", "dynamic"]
THRESHOLDINGS: tuple[Thresholding, ...] = ("none", "static", "dynamic")
QUANTILE = 0.995
MAX_SAMPLES = 65_536  # pixels that the quantile is read from: a strided sample of a 1024 picture is exact enough


def threshold(kind: Thresholding, x0: Any) -> Any:
    """Threshold one sample's x0 [C, H, W] (NumPy or torch).

    dynamic: s = max(1, the 99.5 % quantile of |x0|); clip to [-s, s] and divide by s.
    """
    if kind == "none":
        return x0
    if kind == "static":
        return x0.clip(-1.0, 1.0)
    if kind == "dynamic":
        s = max(1.0, quantile_of_magnitude(x0))
        return x0.clip(-s, s) / s
    raise ValueError(f"thresholding: {kind!r} is not one of {THRESHOLDINGS}")


def quantile_of_magnitude(x0: Any) -> float:
    """The QUANTILE of |x0| over one sample, from at most MAX_SAMPLES values taken at an even stride."""
    flat = abs(x0).reshape(-1)
    flat = flat[:: max(1, -(-flat.shape[0] // MAX_SAMPLES))]
    values = flat.detach().float().cpu().numpy() if hasattr(flat, "detach") else np.asarray(flat)
    position = QUANTILE * (values.shape[0] - 1)
    low = int(np.floor(position))
    high = min(low + 1, values.shape[0] - 1)
    ordered = np.partition(values, (low, high))  # linear interpolation, as np.quantile, at a tenth of its time
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))
