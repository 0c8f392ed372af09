"""Near copies: has a picture been drawn, or a neighbor pasted?

The likeness of a picture and a neighbor is the structural similarity (Wang et al. 2004, equation 13, in RGB, windows of 7
pixels at 64 x 64), averaged where either has something in the foreground, so that an empty background counts for nothing.

Alignment: a neighbor is cut out by its alpha and laid over the picture's own border color in each of these ways, and the
best likeness counts: filling the canvas; at half size in each corner (the scenes' placements); with the box of its alpha
fitted to the box of what stands out in the picture, and to the whole canvas (its sides stretched by at most 1.4 against
each other). Moves and scalings are so undone, turns and mirrors are not.

A picture is a near copy where the likeness to one of its neighbors reaches `THRESHOLD`. On 120 prompts of the demonstration
suite that is so of every copy in the prompt's scene, of 98 % of them blurred, 90 % with noise of 8 levels, 87 % as JPEG of
quality 50; and of 10 % of the true pictures: what is right may look like a neighbor, a flag does in all styles. So give the
rate of the true pictures beside it (the base rate), and compare the two in pairs (`intervals.compare`).

Limits: in flat areas little noise lowers the SSIM; a copy in other colors or lines is none. For photographs the usual
measure is SSCD (Pizzi et al. 2022) at 0.5, by an encoder that is not shipped: `feature_copies` takes its features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from skimage.metrics import structural_similarity

from common.images import over_color, shrink
from common.scenes import CORNERS, SMALL
from evaluation.features import RING, SIDE, VISIBLE
from evaluation.scores.feature_rows import unit_rows
from evaluation.scores.intervals import Interval, mean_interval
from evaluation.scores.sides import shrunk_to

THRESHOLD = 0.7
SSCD_THRESHOLD = 0.5
MAX_STRETCH = 1.4  # of a box's sides against each other: a bar pulled over a square is no copy of it

Box = tuple[int, int, int, int]
"""Left, top, right, bottom; the last two are outside."""


def copy_likeness(picture: np.ndarray, neighbor: np.ndarray) -> float:
    """Likeness in [-1, 1]; 1 for the neighbor itself on a plain background.

    Args:
        picture: uint8 [S, S, 3], S a multiple of 64.
        neighbor: uint8 [64, 64, 4], premultiplied RGBA as of `common.images.rasterize`.

    Raises:
        ValueError: one has another shape.
    """
    small = shrunk_to(picture, SIDE)
    if neighbor.dtype != np.uint8 or neighbor.shape != (SIDE, SIDE, 4):
        raise ValueError(f"neighbor: {neighbor.dtype} {list(neighbor.shape)} is not uint8 [{SIDE}, {SIDE}, 4]")
    background = _border_color(small)
    lab = rgb2lab(small)
    foreground = np.linalg.norm(lab - rgb2lab(background[None, None])[0, 0], axis=-1) > VISIBLE
    if not neighbor[..., 3].any() and not foreground.any():
        return 1.0  # nothing was copied onto nothing
    return max(_likeness(small, foreground, canvas, background) for canvas in _laid(neighbor, foreground))


def copy_likenesses(pictures: Sequence[np.ndarray], neighbors: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """float64 [N]: likeness of each picture to the most similar of its own neighbors; -1 where it had none."""
    if len(pictures) != len(neighbors):
        raise ValueError(f"neighbors: of {len(neighbors)} pictures, there are {len(pictures)}")
    pairs = zip(pictures, neighbors, strict=True)
    return np.array([max((copy_likeness(p, n) for n in found), default=-1.0) for p, found in pairs], np.float64)


def near_copies(likenesses: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """1.0 where a picture is a near copy."""
    return (np.asarray(likenesses) >= threshold).astype(np.float64)


def near_copy_rate(likenesses: np.ndarray, threshold: float = THRESHOLD) -> Interval:
    """The share of pictures that are near copies."""
    return mean_interval(near_copies(likenesses, threshold))


def feature_copies(pictures: np.ndarray, neighbors: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [N]: the largest cosine of each picture's features [N, D] to those of its neighbors [K, D]; -1 without."""
    rows = unit_rows("pictures", pictures)
    if len(neighbors) != len(rows):
        raise ValueError(f"neighbors: of {len(neighbors)} pictures, there are {len(rows)}")
    found = [
        float((unit_rows(f"neighbors[{i}]", n) @ rows[i]).max()) if len(n) else -1.0 for i, n in enumerate(neighbors)
    ]
    return np.array(found, np.float64)


def _border_color(picture: np.ndarray) -> np.ndarray:
    ring = np.ones(picture.shape[:2], bool)
    ring[RING:-RING, RING:-RING] = False
    return np.rint(np.median(picture[ring], axis=0)).astype(np.uint8)


def _laid(neighbor: np.ndarray, foreground: np.ndarray) -> Iterator[np.ndarray]:
    """The neighbor on a canvas [64, 64, 4], in every way in which it is looked for."""
    yield neighbor
    half, size = shrink(neighbor, SMALL), SIDE // SMALL
    for row, column in CORNERS.values():
        canvas = np.zeros_like(neighbor)
        top, left = row * (SIDE - size), column * (SIDE - size)
        canvas[top : top + size, left : left + size] = half
        yield canvas
    cut, place = _box(neighbor[..., 3] > 0), _box(foreground)
    for box in ((0, 0, SIDE, SIDE), place):
        if cut is not None and box is not None and 1 / MAX_STRETCH <= _aspect(cut) / _aspect(box) <= MAX_STRETCH:
            yield _stretched(neighbor, cut, box)


def _aspect(box: Box) -> float:
    return (box[2] - box[0]) / (box[3] - box[1])


def _box(mask: np.ndarray) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _stretched(neighbor: np.ndarray, cut: Box, place: Box) -> np.ndarray:
    left, top, right, bottom = place
    size = (right - left, bottom - top)
    planes = [
        Image.fromarray(np.ascontiguousarray(neighbor[..., c])).resize(size, Image.Resampling.BILINEAR, box=cut)
        for c in range(4)
    ]  # plane by plane: of an RGBA picture Pillow would multiply by alpha once more
    canvas = np.zeros_like(neighbor)
    canvas[top:bottom, left:right] = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return canvas


def _likeness(picture: np.ndarray, foreground: np.ndarray, canvas: np.ndarray, background: np.ndarray) -> float:
    compared = foreground | (canvas[..., 3] > 0)
    laid = over_color(canvas, background.tolist())
    similar = np.asarray(structural_similarity(picture, laid, channel_axis=-1, data_range=255.0, full=True)[1])
    return float(similar.mean(-1)[compared].mean())
