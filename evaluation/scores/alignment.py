"""Text alignment of demonstration scenes: background color, placement and style, as the prompt names them.

Color and placement are read off the pixels by fixed rules (`evaluation.features`), style by a classifier (`style.py`). Every
figure stands beside that of the true pictures, judged alike: an entity may cover the border, or hardly stand out.

Limits: the rules are the demonstration scenes' own (plain backgrounds, half-size entities in corners) and mean nothing for
other pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from common.scenes import Scene
from evaluation.features import SIDE, background_color, quarter_of
from evaluation.scores.sides import shrunk_to


def backgrounds_right(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> np.ndarray:
    """float64 [N]: 1.0 where the border has the color the scene names, NaN where it names none.

    Raises:
        ValueError: lengths differ, or a picture is not square of 64, 128, 256, ... pixels.
    """
    return _judged(pictures, scenes, lambda picture, scene: (scene.color, background_color(picture)))


def placements_right(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> np.ndarray:
    """float64 [N]: 1.0 where the entity lies in the corner the scene names, NaN where it names none."""
    return _judged(pictures, scenes, lambda picture, scene: (scene.corner, quarter_of(picture)))


def _judged(
    pictures: Sequence[np.ndarray],
    scenes: Sequence[Scene],
    judge: Callable[[np.ndarray, Scene], tuple[str | None, str | None]],
) -> np.ndarray:
    if len(pictures) != len(scenes):
        raise ValueError(f"pictures: {len(pictures)} for {len(scenes)} scenes")
    judged = (judge(shrunk_to(picture, SIDE), scene) for picture, scene in zip(pictures, scenes, strict=True))
    return np.array([np.nan if wanted is None else float(wanted == seen) for wanted, seen in judged], np.float64)
