"""Measures of a picture that nothing here was trained on.

Entity features: histograms of oriented gradients (Dalal & Triggs 2005) for shape, and an 8 x 8 grid of CIE Lab colors
for layout, each of unit length. They are hand-made: no network, and so none of the generator's, can have fitted them.
Limits: they compare place by place, so an entity that is moved or turned counts as another.
"""

from __future__ import annotations

import numpy as np
from skimage.color import rgb2gray, rgb2lab
from skimage.feature import hog

from common.images import shrink
from common.scenes import COLORS, CORNERS, WHITE

SIDE = 64
RING = 3  # width in pixels of the border that the background is read from, at SIDE
VISIBLE = 15.0  # distance in CIE Lab from the background
NEARLY_ALL = 0.8
EMPTY = 1e-6  # length of a feature that is rounding alone: a picture of one color is like nothing


def entity_features(pixels: np.ndarray) -> np.ndarray:
    """uint8 [64, 64, 3] -> float64 vector; the dot product of two is their likeness, at most 2."""
    shape = hog(rgb2gray(pixels), orientations=8, pixels_per_cell=(8, 8), cells_per_block=(2, 2), feature_vector=True)
    layout = rgb2lab(shrink(pixels, SIDE // 8)).reshape(-1, 3)
    layout = (layout - layout.mean(axis=0)).ravel()
    return np.concatenate([_unit(shape), _unit(layout)])


def _unit(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector / length if length > EMPTY else np.zeros_like(vector)


def rank_of(query: np.ndarray, gallery: np.ndarray, target: int) -> int:
    """Rank (1 is best) of row `target` of `gallery` [N, D] by likeness to `query` [D]; ties count against it."""
    likeness = gallery @ query
    return int((likeness >= likeness[target]).sum())


def background_color(pixels: np.ndarray) -> str:
    """Name of the color (or "white") nearest to most of the border's pixels; uint8 [64, 64, 3]."""
    names = ["white", *COLORS]
    palette = rgb2lab(np.array([[WHITE, *COLORS.values()]], np.uint8))[0]
    ring = np.ones(pixels.shape[:2], bool)
    ring[RING:-RING, RING:-RING] = False
    border = rgb2lab(pixels)[ring]
    nearest = np.linalg.norm(border[:, None] - palette[None], axis=-1).argmin(axis=1)
    return names[int(np.bincount(nearest, minlength=len(names)).argmax())]


def quarter_of(pixels: np.ndarray) -> str | None:
    """The corner whose quarter holds nearly all of what stands on the background, None if no quarter does.

    The background is the picture's median color: a small entity covers at most a quarter. uint8 [64, 64, 3].
    """
    lab = rgb2lab(pixels)
    stands_out = np.linalg.norm(lab - np.median(lab.reshape(-1, 3), axis=0), axis=-1) > VISIBLE
    half = pixels.shape[0] // 2
    for corner, (row, column) in CORNERS.items():
        inside = stands_out[row * half : (row + 1) * half, column * half : (column + 1) * half]
        if stands_out.any() and inside.sum() >= NEARLY_ALL * stands_out.sum():
            return corner
    return None


def psnr(pixels: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures of one shape; 100 for equal ones."""
    error = float(np.mean((pixels.astype(np.float64) - true.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else 10.0 * float(np.log10(255.0**2 / error))
