"""Where a preset's batches come from: whole pictures with neighbors, or crops of vector pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.scenes import Scene, compose, sample_scene
from common.stages import StageSpec
from trainer.batches import Batch, base_batch, picture, random_crops, super_resolution_batch, with_captions
from trainer.dataset import RENDER_SIZE, Prepared
from trainer.presets import Preset


class Source(Protocol):
    """Draws batches of training pairs, and of held-out pairs for evaluation."""

    def batch(self, rng: np.random.Generator, side: int) -> Batch: ...

    def held_out_batch(self, rng: np.random.Generator, side: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class NeighborSource:
    """Batches of the first stage."""

    prepared: Prepared
    preset: Preset

    def batch(self, rng: np.random.Generator, side: int) -> Batch:
        return self._draw(rng, side, held_out=False)

    def held_out_batch(self, rng: np.random.Generator, side: int) -> Batch:
        return self._draw(rng, side, held_out=True)

    def _draw(self, rng: np.random.Generator, side: int, *, held_out: bool) -> Batch:
        anchors = rng.choice(self._anchors(held_out=held_out), self.preset.groups)
        return base_batch(self.prepared, self.preset, rng, side, anchors)

    def check(self) -> None:
        """Whether there are pairs to train on and pairs to evaluate on.

        Raises:
            ValueError: there are not; the message names the folder and what it lacks.
        """
        for held_out in (False, True):
            self._anchors(held_out=held_out)

    def _anchors(self, *, held_out: bool) -> np.ndarray:
        needed = max(1, self.preset.neighbors)
        enough = (self.prepared.neighbors >= 0).sum(1) >= needed
        of_split = self.prepared.held_out == held_out
        kind = f" with {needed} neighbors or more" if of_split.any() else ""  # where there is no pair, that is why
        return _some(np.flatnonzero(of_split & enough), self.prepared, held_out, kind)


@dataclass(frozen=True, kw_only=True)
class CropSource:
    """Batches of a super-resolution stage: crops of pictures drawn at RENDER_SIZE, or of stored larger crops.

    Where the U-Net reads text, pictures are drawn in a scene whose caption is encoded, and crops stay upright.

    Attributes:
        pixels: premultiplied RGBA uint8 [N, side, side, 4].
        owners: the pair of each row of `pixels` [N].
    """

    prepared: Prepared
    preset: Preset
    spec: StageSpec
    pixels: np.ndarray
    owners: np.ndarray

    def batch(self, rng: np.random.Generator, side: int) -> Batch:
        return self._draw(rng, side, held_out=False)

    def held_out_batch(self, rng: np.random.Generator, side: int) -> Batch:
        return self._draw(rng, side, held_out=True)

    def _draw(self, rng: np.random.Generator, side: int, *, held_out: bool) -> Batch:
        rows = rng.choice(self._rows(held_out=held_out), self.preset.groups)
        read = self.preset.unet.text_width > 0
        variants = [self._variant(int(row), rng) for row in rows] if read else []
        pictures = (
            [self._captioned(int(row), variant) for row, variant in zip(rows, variants, strict=True)]
            if read
            else [self._picture(int(row), rng) for row in rows]
        )
        crops = random_crops(pictures, rng, side, self.spec.scale, turned=not read)
        batch = super_resolution_batch(crops, self.preset, rng, side, self.spec.train_augmentation)
        captions = [(int(self.owners[row]), variant) for row, variant in zip(rows, variants, strict=False)]
        return with_captions(batch, self.prepared, self.preset, rng, side, captions) if read else batch

    def check(self) -> None:
        """Whether there are pairs to train on and pairs to evaluate on.

        Raises:
            ValueError: there are not; the message names the folder and what it lacks.
        """
        for held_out in (False, True):
            self._rows(held_out=held_out)

    def _rows(self, *, held_out: bool) -> np.ndarray:
        return _some(np.flatnonzero(self.prepared.held_out[self.owners] == held_out), self.prepared, held_out, "")

    def _variant(self, row: int, rng: np.random.Generator) -> int:
        """One of the scenes of the row's pair; of a stored crop, one that shows the entity at its whole size."""
        scenes = self.prepared.scenes[self.owners[row]]
        whole = self.spec.size <= RENDER_SIZE
        return int(rng.choice([v for v, scene in enumerate(scenes) if whole or scene.corner is None]))

    def _captioned(self, row: int, variant: int) -> np.ndarray:
        pair = int(self.owners[row])
        if self.spec.size <= RENDER_SIZE:
            return picture(self.prepared, pair, variant, RENDER_SIZE)
        pixels = self.pixels[row]
        return compose(lambda n: pixels, self.prepared.scenes[pair][variant], pixels.shape[0])

    def _picture(self, row: int, rng: np.random.Generator) -> np.ndarray:
        full = self.pixels[row]
        color = sample_scene(_python_rng(rng)).color
        # Small entities are seen too: a quarter of whole pictures are drawn at half their side in a corner.
        if self.spec.size <= RENDER_SIZE and rng.random() < 0.25:
            corner = ("top left", "top right", "bottom left", "bottom right")[int(rng.integers(4))]
            half = self.prepared.pictures[RENDER_SIZE // 2][self.owners[row]]
            return compose(lambda n: half, Scene(color=color, corner=corner), RENDER_SIZE)
        return compose(lambda n: full, Scene(color=color), full.shape[0])


def _some(found: np.ndarray, prepared: Prepared, held_out: bool, kind: str) -> np.ndarray:
    """What was found.

    Raises:
        ValueError: that is nothing.
    """
    if len(found):
        return found
    wanted, what = ("held-out", "evaluation") if held_out else ("training", "training")
    remedy = (
        "look up more of them (`python -m trainer knn --k`), or in a knowledge base of more pairs"
        if kind
        else "say `held_out` of some pairs of its corpus, not of all (`python -m trainer corpus --hold-out` does), and "
        "prepare it and look up its neighbors again"
    )
    raise ValueError(f"--data: {prepared.folder} has no {wanted} pairs{kind}, and {what} needs some: {remedy}")


def _python_rng(rng: np.random.Generator) -> random.Random:
    return random.Random(int(rng.integers(2**62)))
