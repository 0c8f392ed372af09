"""Pictures at the size a measure wants."""

from __future__ import annotations

import numpy as np

from common.images import shrink


def shrunk_to(picture: np.ndarray, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the mean of each square of pixels.

    Raises:
        ValueError: the picture is not square, or its side is no multiple of `side`.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture: {picture.dtype} {list(picture.shape)} is not uint8 [H, W, 3]")
    height, width = picture.shape[:2]
    if height != width or height < side or height % side:
        raise ValueError(f"picture: {height} x {width} cannot be shrunk to {side} x {side}")
    return picture if height == side else shrink(picture, height // side)
