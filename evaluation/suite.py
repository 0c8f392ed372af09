"""The demonstration suite: prompts about held-out entities, with the pictures that tell right from wrong."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.corpus import Pair, iter_pairs
from common.images import rasterize
from common.scenes import Scene, caption, compose, sample_scene
from evaluation.features import SIDE, entity_features

MIN_GALLERY = 100
MIN_STYLES = 3  # an entity is asked for in one style, and found in at least two others


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of the suite: a held-out entity, in a style and a scene. `target` is the pair asked for."""

    text: str
    target: Pair
    scene: Scene

    def true_picture(self, size: int) -> np.ndarray:
        """uint8 [size, size, 3]: what a perfect answer looks like."""
        return draw(self.target, self.scene, size)


def draw(pair: Pair, scene: Scene, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a pair in a scene."""
    return compose(lambda side: rasterize(pair.image, pair.image_format, side), scene, size)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts, and the held-out pairs of each style (one an entity): the gallery."""

    prompts: Sequence[Prompt]
    gallery: dict[str, list[Pair]]

    @property
    def smallest_gallery(self) -> int:
        return min(len(pairs) for pairs in self.gallery.values())

    @cached_property
    def _features(self) -> dict[tuple[str, Scene], np.ndarray]:
        return {}

    def gallery_features(self, style: str, scene: Scene) -> np.ndarray:
        """Entity features of the style's true pictures in a scene [N, D], computed once."""
        if (style, scene) not in self._features:
            pictures = [draw(pair, scene, SIDE) for pair in self.gallery[style]]
            self._features[style, scene] = np.stack([entity_features(picture) for picture in pictures])
        return self._features[style, scene]


def demo_suite(corpus: Path, count: int, min_gallery: int = MIN_GALLERY) -> Suite:
    """The first `count` prompts of the demonstration suite, in an order drawn from their keys.

    Raises:
        ValueError: the corpus has fewer held-out pairs that qualify.
    """
    held_out = [pair for pair in iter_pairs(corpus) if pair.held_out]
    gallery = by_style(held_out, min_gallery)
    num_styles = Counter(pair.entity for pair in held_out)
    asked = [p for p in held_out if num_styles[p.entity] >= MIN_STYLES and p.facets["style"] in gallery]
    random.Random("demo suite").shuffle(asked)
    if len(asked) < count:
        raise ValueError(f"prompts: {count} asked for, the corpus has {len(asked)} held-out pairs that qualify")
    return Suite(prompts=[_prompt(pair) for pair in asked[:count]], gallery=gallery)


def by_style(held_out: Sequence[Pair], min_gallery: int = MIN_GALLERY) -> dict[str, list[Pair]]:
    """The held-out pairs of each style that has `min_gallery` of them: among few, any picture is found."""
    gallery: dict[str, list[Pair]] = defaultdict(list)
    for pair in held_out:
        gallery[pair.facets["style"]].append(pair)
    return {style: pairs for style, pairs in sorted(gallery.items()) if len(pairs) >= min_gallery}


def _prompt(pair: Pair) -> Prompt:
    scene = sample_scene(random.Random(f"suite/{pair.key}"))
    return Prompt(text=caption(pair.entity, pair.facets["style"], scene), target=pair, scene=scene)
