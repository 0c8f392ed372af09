"""Scenes: what a prompt says is where the entity stands and what is behind it."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from common.scenes import (
    COLORS,
    CORNERS,
    SMALL,
    WHITE,
    Scene,
    all_scenes,
    caption,
    compose,
    sample_scene,
    scene_phrases,
)

INK = (9, 201, 99)


def solid(side: int) -> np.ndarray:
    """An opaque entity that fills its square."""
    return np.broadcast_to(np.array([*INK, 255], np.uint8), (side, side, 4))


def test_there_are_55_scenes_each_said_differently() -> None:
    scenes = all_scenes()
    assert len(scenes) == len(set(scenes)) == 55
    assert len({caption("guide dog", "noto", s) for s in scenes}) == 55
    assert Counter((s.color is None, s.corner is None) for s in scenes) == {
        (True, True): 1,
        (False, True): 10,
        (True, False): 4,
        (False, False): 40,
    }


def test_captions() -> None:
    assert caption("guide dog", "noto", Scene()) == "guide dog, noto style, on a white background"
    assert caption("guide dog", "noto", Scene(color="blue")) == "guide dog, noto style, on a blue background"
    assert (
        caption("red apple", "twemoji", Scene(color="gray", corner="top left"))
        == "red apple, twemoji style, small in the top left corner, on a gray background"
    )


def test_every_phrase_is_known_once() -> None:
    phrases = scene_phrases()
    assert len(phrases) == len(set(phrases)) == 4 + 11
    assert set(phrases) == {p for s in all_scenes() for p in s.phrases}
    assert "on a white background" in phrases
    # None is part of another: a rule that strips phrases from a query cannot strip half of one.
    assert not [(a, b) for a in phrases for b in phrases if a != b and a in b]


@pytest.mark.parametrize("scene", all_scenes(), ids=lambda s: ", ".join(s.phrases))
def test_composition(scene: Scene) -> None:
    size = 16
    picture = compose(solid, scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    inked = (picture == INK).all(-1)
    expected = np.zeros((size, size), bool)
    rows = {"top": slice(0, 8), "bottom": slice(8, 16)}
    columns = {"left": slice(0, 8), "right": slice(8, 16)}
    if scene.corner is None:
        expected[:] = True
    else:
        row, column = scene.corner.split()
        expected[rows[row], columns[column]] = True
    np.testing.assert_array_equal(inked, expected)
    behind = COLORS[scene.color] if scene.color else (255, 255, 255)
    assert scene.rgb == behind
    assert (picture[~inked] == behind).all()


@pytest.mark.parametrize("scene", [Scene(color="red"), Scene(color="red", corner="bottom right"), Scene()])
def test_a_transparent_entity_is_its_background(scene: Scene) -> None:
    picture = compose(lambda n: np.zeros((n, n, 4), np.uint8), scene, 8)
    assert (picture == scene.rgb).all()


def test_the_entity_is_drawn_at_the_side_it_has() -> None:
    asked: list[int] = []

    def draw(side: int) -> np.ndarray:
        asked.append(side)
        return solid(side)

    compose(draw, Scene(), 64)
    compose(draw, Scene(corner="top left"), 64)
    assert asked == [64, 64 // SMALL]


def test_edges_blend_without_a_seam() -> None:
    """Half-covered pixels of premultiplied ink over a color: exactly the weighted mean, rounded."""
    half = np.broadcast_to(np.array([100, 50, 0, 128], np.uint8), (4, 4, 4))
    picture = compose(lambda n: half, Scene(color="yellow"), 4)
    expected = [round(ink + (127 / 255) * c) for ink, c in zip((100, 50, 0), COLORS["yellow"], strict=True)]
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_colors_can_be_told_apart() -> None:
    """`background_accuracy` is measured by the nearest color."""
    named = np.array([*COLORS.values(), WHITE], float)
    distances = np.linalg.norm(named[:, None] - named[None], axis=-1) + 1e9 * np.eye(len(named))
    assert distances.min() > 40


def test_draws_have_the_stated_shares() -> None:
    rng = random.Random(0)
    drawn = [sample_scene(rng) for _ in range(20_000)]
    shares = Counter((s.color is not None, s.corner is not None) for s in drawn)
    for kind, share in {(False, False): 0.25, (True, False): 0.45, (False, True): 0.10, (True, True): 0.20}.items():
        assert shares[kind] / len(drawn) == pytest.approx(share, abs=0.015)
    assert {s.color for s in drawn} == {None, *COLORS}
    assert {s.corner for s in drawn} == {None, *CORNERS}
