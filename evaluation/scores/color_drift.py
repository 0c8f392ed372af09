"""Color drift: do the super-resolution stages keep the colors of the small picture?

The mean absolute difference, in levels of 255, between a picture and its enlargement averaged back to the same size. Users of
cascades complain of it (upscalers that predict noise shift whole pictures in color). 0 to 255; rounding alone stays below 0.5.

Limits: detail that the enlargement rightly adds within a pixel counts only by its mean; noise augmentation of the input shows.
"""

from __future__ import annotations

import numpy as np

from evaluation.scores.sides import shrunk_to


def color_drift(small: np.ndarray, large: np.ndarray) -> float:
    """Of uint8 [S, S, 3] and uint8 [n S, n S, 3].

    Raises:
        ValueError: one is not square, or the sides do not fit.
    """
    small = shrunk_to(small, small.shape[0])
    return float(np.abs(shrunk_to(large, small.shape[0]).astype(np.float64) - small).mean())
