"""The scenes of the demonstration corpus: how a prompt says them, and how a picture shows them.

A scene is a background color and a placement. A caption is "<entity>, <style> style[, small in the <corner> corner],
on a <color> background"; style and scene are text alignment, the entity is neighbor alignment, and each can be measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common.images import over_color

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (60, 160, 70),
    "blue": (45, 95, 215),
    "purple": (125, 60, 175),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
    "gray": (130, 130, 130),
    "black": (15, 15, 15),
}
WHITE = (255, 255, 255)
CORNERS: dict[str, tuple[int, int]] = {  # (row, column) of the corner: 0 = top or left, 1 = bottom or right
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
}
SMALL = 2  # a small entity is drawn at 1 / SMALL of the picture's side


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`color` None is white; `corner` None fills the picture."""

    color: str | None = None
    corner: str | None = None

    @property
    def rgb(self) -> tuple[int, int, int]:
        return COLORS[self.color] if self.color else WHITE

    @property
    def phrases(self) -> tuple[str, ...]:
        place = (f"small in the {self.corner} corner",) if self.corner else ()
        return (*place, f"on a {self.color or 'white'} background")


def all_scenes() -> list[Scene]:
    """Plain white, ten colors, four corners, and every color with every corner: 55 scenes."""
    return [Scene(color=color, corner=corner) for corner in (None, *CORNERS) for color in (None, *COLORS)]


def scene_phrases() -> tuple[str, ...]:
    """Every phrase by which a prompt names a scene."""
    seen = {phrase: None for scene in all_scenes() for phrase in scene.phrases}
    return tuple(seen)


def caption(entity: str, style: str, scene: Scene) -> str:
    """The caption (and the prompt) of an entity drawn in a style in a scene."""
    return ", ".join((entity, f"{style} style", *scene.phrases))


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene: 25 % plain white, 45 % colored, 10 % small on white, 20 % small on a color."""
    family = rng.random()
    color = rng.choice(tuple(COLORS)) if 0.25 <= family < 0.70 or family >= 0.80 else None
    corner = rng.choice(tuple(CORNERS)) if family >= 0.70 else None
    return Scene(color=color, corner=corner)


def compose(draw: Callable[[int], np.ndarray], scene: Scene, size: int) -> np.ndarray:
    """Draw the scene.

    Args:
        draw: gives the entity as premultiplied RGBA uint8 [n, n, 4] for a side n.
        scene: the scene.
        size: side of the picture in pixels, even.

    Returns:
        uint8 [size, size, 3].
    """
    if scene.corner is None:
        return over_color(draw(size), scene.rgb)
    canvas = np.zeros((size, size, 4), np.uint8)
    side = size // SMALL
    row, column = CORNERS[scene.corner]
    canvas[row * (size - side) : row * (size - side) + side, column * (size - side) : column * (size - side) + side] = (
        draw(side)
    )
    return over_color(canvas, scene.rgb)
