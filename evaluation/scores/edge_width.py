"""Edge width: over how many pixels do the edges of a picture go from one color to the other?

In each window, the channel whose values lie farthest apart: their distance by the steepest difference of two adjacent pixels.
A sharp edge of vector art, anti-aliased, has a width of 1; one that is a ramp of n pixels has n.

Limits: windows of less contrast than CONTRAST are not looked at, so that flat color and gradients do not count; an edge wider
than a window counts as what the window shows of it; of thin lines the nearer side counts.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from evaluation.scores.sides import shrunk_to

WINDOW = 17  # pixels; odd
CONTRAST = 0.2  # of white against black
_EVERY = 8  # windows begin so many pixels apart


def edge_widths(picture: np.ndarray) -> np.ndarray:
    """Widths in pixels [N], one for each window of a uint8 picture [S, S, 3] that has an edge; N may be 0.

    Raises:
        ValueError: the picture is not square, or smaller than a window.
    """
    side = picture.shape[0]
    values = shrunk_to(picture, side).astype(np.float32) / 255.0
    if side < WINDOW:
        raise ValueError(f"picture: {side} x {side} is smaller than a window of {WINDOW} pixels")
    steps = np.zeros_like(values)
    steps[:, :-1] = np.abs(np.diff(values, axis=1)) ** 2
    steps[:-1] += np.abs(np.diff(values, axis=0)) ** 2
    highest, lowest, steepest = (
        _windows(found) for found in (_max(values), minimum_filter(values, (WINDOW, WINDOW, 1)), _max(steps))
    )
    contrast = highest - lowest
    channel = contrast.argmax(-1)[..., None]
    contrast, steepest = (np.take_along_axis(found, channel, -1)[..., 0] for found in (contrast, np.sqrt(steepest)))
    seen = contrast >= CONTRAST
    return contrast[seen] / steepest[seen]


def _max(values: np.ndarray) -> np.ndarray:
    return maximum_filter(values, (WINDOW, WINDOW, 1))


def _windows(filtered: np.ndarray) -> np.ndarray:
    """Of what was found around each pixel, that around the centers of windows which lie in the picture."""
    half = WINDOW // 2
    return filtered[half:-half:_EVERY, half:-half:_EVERY]
