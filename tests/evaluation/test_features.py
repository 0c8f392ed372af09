"""The measures, on pictures whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from common.corpus import Pair
from common.scenes import COLORS, CORNERS, Scene, compose
from evaluation.features import background_color, entity_features, psnr, quarter_of, rank_of
from evaluation.suite import draw

SHAPES = {
    "disk": '<circle cx="16" cy="16" r="12" fill="#c33"/>',
    "bar": '<rect x="2" y="13" width="28" height="6" fill="#333"/>',
    "triangle": '<path d="M16 3 30 29 2 29z" fill="#36c"/>',
    "ring": '<circle cx="16" cy="16" r="10" fill="none" stroke="#393" stroke-width="5"/>',
}


def pair(name: str) -> Pair:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">{SHAPES[name]}</svg>'
    return Pair(key=name, caption=name, image=svg.encode(), image_format="svg", entity=name)


def test_a_picture_is_nearest_to_itself_and_a_noisy_copy_too() -> None:
    gallery = np.stack([entity_features(draw(pair(name), Scene(), 64)) for name in SHAPES])
    rng = np.random.default_rng(0)
    for row, name in enumerate(SHAPES):
        picture = draw(pair(name), Scene(), 64)
        assert rank_of(entity_features(picture), gallery, row) == 1
        noisy = np.clip(picture + rng.normal(0, 15, picture.shape), 0, 255).astype(np.uint8)
        assert rank_of(entity_features(noisy), gallery, row) == 1
        assert rank_of(entity_features(picture), gallery, (row + 1) % len(SHAPES)) > 1


def test_ties_count_against_the_target() -> None:
    gallery = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert rank_of(np.array([1.0, 0.0]), gallery, 0) == 2
    assert rank_of(np.array([1.0, 0.0]), gallery, 2) == 3


@pytest.mark.parametrize("color", [None, *COLORS])
def test_background_color_of_every_scene(color: str | None) -> None:
    for corner in (None, "top left", "bottom right"):
        picture = draw(pair("disk"), Scene(color=color, corner=corner), 64)
        assert background_color(picture) == (color or "white")


def test_an_entity_that_covers_the_border_hides_the_background() -> None:
    covered = compose(lambda n: np.full((n, n, 4), (214, 40, 40, 255), np.uint8), Scene(color="blue"), 64)
    assert background_color(covered) == "red"


@pytest.mark.parametrize("color", [None, "yellow", "black"])
@pytest.mark.parametrize("corner", [None, *CORNERS])
def test_the_quarter_that_a_small_entity_lies_in(corner: str | None, color: str | None) -> None:
    picture = draw(pair("triangle"), Scene(color=color, corner=corner), 64)
    assert quarter_of(picture) == corner
    assert quarter_of(np.full_like(picture, 40)) is None


def test_psnr_is_that_of_scikit_image_and_of_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b))
    assert psnr(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 10, np.uint8)) == pytest.approx(
        20 * math.log10(255 / 10)
    )
    assert psnr(a, a) == 100.0
