"""Batches. Every draw of step i comes from (seed, step i), so that a resumed run reads what the first would have read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.images import shrink, to_unit
from common.scenes import CORNERS, SMALL, Scene, compose
from common.unet.config import PLACEMENT_SIZE
from trainer.dataset import NUM_SCENES, Prepared
from trainer.presets import Preset

CANDIDATES = 6  # neighbors are drawn from this many nearest pairs: the same pair is seen with different ones
TIME_MARGIN = 1e-4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of B examples over G neighbor sets.

    Attributes:
        x0: pictures in [-1, 1] [B, 3, H, W].
        eps: noise [B, 3, H, W].
        t: times [B].
        low_res, low_res_eps, low_res_t: the same of the low-resolution input; sides 0 in the first stage.
        text, text_mask: token states of the captions [B, L, D], [B, L].
        group: neighbor set of each example [B].
        neighbors, neighbor_text, neighbor_text_mask, neighbor_mask: the sets [G, K, ...].
        keep_text, keep_neighbors: false where the condition is dropped [B].
        placement: zoom and shift (row, column each) by which the picture's places are found in a whole drawing, and the
            color of its ground, less white [B, PLACEMENT_SIZE].
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    low_res: Tensor
    low_res_eps: Tensor
    low_res_t: Tensor
    text: Tensor
    text_mask: Tensor
    group: Tensor
    neighbors: Tensor
    neighbor_text: Tensor
    neighbor_text_mask: Tensor
    neighbor_mask: Tensor
    keep_text: Tensor
    keep_neighbors: Tensor
    placement: Tensor

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def rng_of(seed: int, step: int) -> np.random.Generator:
    """The generator of one step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))


def picture(prepared: Prepared, pair: int, variant: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3] of a pair in one of its scenes."""
    return compose(lambda n: prepared.pictures[n][pair], prepared.scenes[pair][variant], side)


def placement(scene: Scene) -> tuple[float, ...]:
    """Zoom and shift (row, column each) from a place p of the scene, in canvas units, to its place in the entity's own
    drawing: (1 + zoom) (p - 0.5) + 0.5 + shift; then the color of its ground in [-1, 1], less white."""
    color = [value / 127.5 - 2.0 for value in scene.rgb]
    if scene.corner is None:
        return 0.0, 0.0, 0.0, 0.0, *color
    row, column = CORNERS[scene.corner]
    return SMALL - 1, SMALL - 1, (SMALL - 1) * (0.5 - row), (SMALL - 1) * (0.5 - column), *color


def base_batch(prepared: Prepared, preset: Preset, rng: np.random.Generator, side: int, anchors: np.ndarray) -> Batch:
    """A batch of the first stage.

    Each anchor brings its neighbors and further pairs that have the same neighbors: an entity in several styles is
    drawn from one encoded set, which is most of what a step costs.

    Args:
        anchors: pairs to start from [groups]; from the training split, or held out for evaluation.
    """
    targets: list[int] = []
    sets: list[list[int]] = []
    for anchor in anchors:
        chosen, companions = _neighbor_set(prepared, int(anchor), preset.neighbors, rng)
        sets.append(chosen)
        targets += [int(anchor), *(int(c) for c in rng.choice(companions, preset.draws - 1))]
    variants = rng.integers(0, NUM_SCENES, len(targets))
    pictures = np.stack([picture(prepared, p, int(v), side) for p, v in zip(targets, variants, strict=True)])
    text, mask = prepared.text([p * NUM_SCENES + int(v) for p, v in zip(targets, variants, strict=True)])
    size = len(targets)
    neighbors, neighbor_text, neighbor_text_mask, neighbor_mask = _neighbor_arrays(
        prepared, sets, preset.neighbors, side
    )
    return Batch(
        x0=_images(pictures),
        eps=_noise(rng, (size, 3, side, side)),
        t=torch.from_numpy(_times(rng, size, preset.time_exponent)),
        low_res=torch.zeros(size, 3, 0, 0),
        low_res_eps=torch.zeros(size, 3, 0, 0),
        low_res_t=torch.zeros(size),
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(mask),
        group=torch.arange(len(sets)).repeat_interleave(preset.draws),
        neighbors=neighbors,
        neighbor_text=neighbor_text,
        neighbor_text_mask=neighbor_text_mask,
        neighbor_mask=neighbor_mask,
        keep_text=torch.from_numpy(rng.random(size) >= preset.text_dropout),
        keep_neighbors=torch.from_numpy(rng.random(size) >= preset.neighbor_dropout),
        placement=torch.from_numpy(
            np.array(
                [placement(prepared.scenes[p][int(v)]) for p, v in zip(targets, variants, strict=True)], np.float32
            )
        ),
    )


def _neighbor_set(
    prepared: Prepared, anchor: int, count: int, rng: np.random.Generator
) -> tuple[list[int], np.ndarray]:
    """`count` of the anchor's nearest pairs, and the pairs (the anchor among them) that have all of these too."""
    near = prepared.neighbors[anchor]
    near = near[near >= 0]
    if not prepared.held_out[anchor]:
        near = near[~prepared.held_out[near]]  # whatever the neighbors were asked of: none is seen in training
    near = near[:CANDIDATES]
    picked = rng.permutation(near)[:count]
    others = [
        j
        for j in near
        if j not in picked
        and prepared.held_out[j] == prepared.held_out[anchor]
        and np.isin(picked, prepared.neighbors[j][: CANDIDATES + 2]).all()
    ]
    return [int(p) for p in picked], np.array([anchor, *others])


def _neighbor_arrays(
    prepared: Prepared, sets: list[list[int]], count: int, side: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = [pair for chosen in sets for pair in (chosen + [-1] * count)[:count]]
    pictures = np.stack([picture(prepared, max(p, 0), 0, side) for p in flat])
    text, mask = prepared.text([max(p, 0) * NUM_SCENES for p in flat])
    shape = (len(sets), count)
    return (
        _images(pictures).unflatten(0, shape),
        torch.from_numpy(text).unflatten(0, shape),
        torch.from_numpy(mask).unflatten(0, shape),
        torch.tensor([p >= 0 for p in flat]).unflatten(0, shape),
    )


def super_resolution_batch(
    crops: np.ndarray, preset: Preset, rng: np.random.Generator, side: int, train_augmentation: float
) -> Batch:
    """A batch of a super-resolution stage from uint8 crops [B, side, side, 3]; the input is the crop, shrunk."""
    size, low = len(crops), side // preset.unet.scale
    low_t = train_augmentation * rng.random(size, np.float32) * (rng.random(size) >= preset.clean_share)
    none = torch.zeros(size, 0, dtype=torch.bool)
    return Batch(
        x0=_images(crops),
        eps=_noise(rng, (size, 3, side, side)),
        t=torch.from_numpy(_times(rng, size, preset.time_exponent)),
        low_res=_images(shrink(crops, preset.unet.scale)),
        low_res_eps=_noise(rng, (size, 3, low, low)),
        low_res_t=torch.from_numpy(low_t.astype(np.float32)),
        text=torch.zeros(size, 0, preset.unet.text_width),
        text_mask=none,
        group=torch.arange(size),
        neighbors=torch.zeros(size, 0, 3, side, side),
        neighbor_text=torch.zeros(size, 0, 0, preset.unet.text_width),
        neighbor_text_mask=torch.zeros(size, 0, 0, dtype=torch.bool),
        neighbor_mask=none,
        keep_text=torch.ones(size, dtype=torch.bool),
        keep_neighbors=torch.ones(size, dtype=torch.bool),
        placement=torch.zeros(size, PLACEMENT_SIZE),
    )


def with_captions(
    batch: Batch,
    prepared: Prepared,
    preset: Preset,
    rng: np.random.Generator,
    side: int,
    captions: Sequence[tuple[int, int]],
) -> Batch:
    """A super-resolution batch that also has texts and neighbors; `captions` are the (pair, scene) of each crop.

    Crops know neither the text's places nor the neighbors': these are whole pictures of `side`.
    """
    text, mask = prepared.text([pair * NUM_SCENES + variant for pair, variant in captions])
    sets = [_neighbor_set(prepared, pair, preset.neighbors, rng)[0] for pair, _ in captions]
    neighbors, neighbor_text, neighbor_text_mask, neighbor_mask = _neighbor_arrays(
        prepared, sets, preset.neighbors, side
    )
    return replace(
        batch,
        text=torch.from_numpy(text),
        text_mask=torch.from_numpy(mask),
        neighbors=neighbors,
        neighbor_text=neighbor_text,
        neighbor_text_mask=neighbor_text_mask,
        neighbor_mask=neighbor_mask,
        keep_text=torch.from_numpy(rng.random(len(captions)) >= preset.text_dropout),
        keep_neighbors=torch.from_numpy(rng.random(len(captions)) >= preset.neighbor_dropout),
    )


def random_crops(
    pictures: list[np.ndarray], rng: np.random.Generator, side: int, multiple: int, *, turned: bool = True
) -> np.ndarray:
    """One crop of each uint8 picture [H, W, 3], its corner a multiple of `multiple`, turned and mirrored at random.

    Of three places tried, the one with most contrast is kept: flat background teaches nothing.
    """
    crops = []
    for pixels in pictures:
        room = (pixels.shape[0] - side) // multiple + 1
        tries = []
        for _ in range(3):
            top, left = rng.integers(0, room, 2) * multiple
            tries.append(pixels[top : top + side, left : left + side])
        crop = max(tries, key=lambda c: float(c[::2, ::2].std()))
        if not turned:
            crops.append(crop)
            continue
        crop = np.rot90(crop, int(rng.integers(4)))
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.ascontiguousarray(np.stack(crops))


def _images(pictures: np.ndarray) -> Tensor:
    unit = torch.from_numpy(to_unit(pictures)).movedim(-1, 1)
    return unit.contiguous(memory_format=torch.channels_last)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return noise.contiguous(memory_format=torch.channels_last)


def _times(rng: np.random.Generator, size: int, exponent: float) -> np.ndarray:
    """Stratified times u^exponent: one u in each of `size` equal parts, in random order (Kingma et al. 2021, appendix I)."""
    t = ((rng.permutation(size) + rng.random(size)) / size) ** exponent
    return np.clip(t, TIME_MARGIN, 1.0).astype(np.float32)
