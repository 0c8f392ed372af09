"""Crops for super-resolution: aligned, of the right split, and shrunk as the cascade shrinks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.images import shrink, to_unit
from common.stages import stage
from tests.trainer.shapes import letters, marked
from trainer.batches import picture, random_crops, rng_of
from trainer.dataset import NUM_SCENES, RENDER_SIZE, Prepared
from trainer.fit_command import open_source
from trainer.presets import Preset, preset
from trainer.sources import CropSource, NeighborSource

SPEC = stage(256)


def crops_of(prepared: Prepared, row: Preset) -> CropSource:
    pixels = prepared.pictures[RENDER_SIZE]
    return CropSource(prepared=prepared, preset=row, spec=SPEC, pixels=pixels, owners=np.arange(len(prepared.keys)))


def test_the_input_is_the_crop_shrunk(prepared: Prepared, tiny_256: Preset) -> None:
    batch = crops_of(prepared, tiny_256).batch(rng_of(0, 0), 32)
    assert batch.x0.shape == (tiny_256.groups, 3, 32, 32)
    assert batch.low_res.shape == batch.low_res_eps.shape == (tiny_256.groups, 3, 8, 8)
    assert batch.neighbors.shape[1] == 0 and batch.neighbor_mask.shape == (tiny_256.groups, 0)
    pixels = ((batch.x0 + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    np.testing.assert_array_equal(batch.low_res.movedim(1, -1).numpy(), to_unit(shrink(pixels, 4)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_augmentation_levels(prepared: Prepared, tiny_256: Preset, share: float) -> None:
    """Uniform up to the stage's largest, and a share of the inputs clean."""
    source = crops_of(prepared, replace(tiny_256, clean_share=share))
    levels = torch.cat([source.batch(rng_of(0, s), 32).low_res_t for s in range(90)])
    assert levels.min() >= 0.0 and levels.max() <= SPEC.train_augmentation
    assert float((levels == 0).float().mean()) == pytest.approx(share, abs=0.05)
    noisy = levels[levels > 0]
    if share < 1.0:
        assert abs(float(noisy.mean()) - SPEC.train_augmentation / 2) < 0.02
        assert float(noisy.max()) > 0.9 * SPEC.train_augmentation


def test_splits_are_kept(tiny_256: Preset) -> None:
    """Crops of one color a pair: no training crop shows a held-out pair, and every held-out crop shows one."""
    base = marked(6, [4, 5], np.zeros((6, 1), np.int32))
    pictures = {
        side: np.broadcast_to(
            np.stack([np.arange(6), np.full(6, 201), np.full(6, 78), np.full(6, 255)], -1).astype(np.uint8)[
                :, None, None
            ],
            (6, side, side, 4),
        )
        for side in (128, 256)
    }
    source = crops_of(replace(base, pictures=pictures), tiny_256)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for step in range(30):
        for held_out in (True, False):
            draw = source.held_out_batch if held_out else source.batch
            levels = ((draw(rng_of(0, step), 32).x0 + 1) * 127.5).round().long()
            inked = (levels[:, 1] == 201) & (levels[:, 2] == 78)
            seen[held_out] |= set(levels[:, 0][inked].unique().tolist())
    assert seen == {True: {4, 5}, False: {0, 1, 2, 3}}


def test_stored_crops_are_not_swapped_for_whole_pictures() -> None:
    """Crops of 1024-pixel drawings are as large as a whole 256-pixel picture, and are none."""
    base = marked(4, [3], np.zeros((4, 1), np.int32))
    pictures = {side: np.full((4, side, side, 4), (0, 0, 0, 255), np.uint8) for side in (128, 256)}
    stored = np.full((8, 256, 256, 4), (9, 201, 78, 255), np.uint8)
    row = replace(preset("tiny-256"), stage=1024, groups=8)
    source = CropSource(
        prepared=replace(base, pictures=pictures), preset=row, spec=stage(1024), pixels=stored, owners=np.arange(8) % 4
    )
    for step in range(30):
        levels = ((source.batch(rng_of(0, step), 32).x0 + 1) * 127.5).round().long()
        assert (levels[:, 1] == 201).all(), "every pixel is of a stored crop"


def test_small_entities_are_seen_in_whole_pictures() -> None:
    base = marked(4, [3], np.zeros((4, 1), np.int32))
    pictures = {side: np.full((4, side, side, 4), (side // 2, 201, 78, 255), np.uint8) for side in (128, 256)}
    source = crops_of(replace(base, pictures=pictures), replace(preset("tiny-256"), groups=16))
    found = torch.cat([source.batch(rng_of(0, s), 32).x0 for s in range(20)])
    small = (((found[:, 0] + 1) * 127.5).round() == 64).any(1).any(1)
    assert 0.02 < float(small.float().mean()) < 0.3


@pytest.mark.parametrize("multiple", [1, 4])
def test_crops_lie_on_the_low_resolution_grid(multiple: int) -> None:
    """Every pixel says where it was: a crop's corner is a multiple of `multiple`, however it was turned."""
    rows, columns = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    whole = np.stack([rows, columns, rows ^ columns], -1).astype(np.uint8)
    corners, turns = set(), set()
    for step in range(80):
        crop = random_crops([whole], rng_of(0, step), 16, multiple)[0]
        top, left = int(crop[..., 0].min()), int(crop[..., 1].min())
        assert top % multiple == left % multiple == 0
        assert crop.shape == (16, 16, 3)
        piece = whole[top : top + 16, left : left + 16]
        variants = [np.rot90(p, k) for p in (piece, piece[:, ::-1]) for k in range(4)]
        matches = [i for i, v in enumerate(variants) if np.array_equal(v, crop)]
        assert matches, "a crop is a piece of the picture, turned or mirrored"
        turns |= set(matches)
        corners.add((top, left))
    assert len(turns) == 8
    assert len(corners) > 20
    assert max(c[0] for c in corners) == 64 - 16 or multiple == 1


def test_crops_prefer_contrast() -> None:
    flat = np.full((64, 64, 3), 200, np.uint8)
    flat[:32, :32] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    busy = np.mean([random_crops([flat], rng_of(0, s), 16, 4)[0].std() > 1 for s in range(200)])
    assert busy > 0.55, "a third of all places touch the busy quarter; the best of three is kept"


def test_conditioned_crops_have_the_caption_of_what_they_show(prepared: Prepared) -> None:
    """The text names the pair and the scene, the neighbors are the pair's, and nothing is turned."""
    row = replace(preset("tiny-256-neighbors"), groups=4)
    source = crops_of(prepared, row)
    for step in range(2):
        batch = source.batch(rng_of(0, step), RENDER_SIZE)  # whole pictures: what is shown can be found again
        again = source.batch(rng_of(0, step), RENDER_SIZE)
        torch.testing.assert_close(batch.text, again.text)
        for i in range(row.groups):
            said = letters(batch.text[i].numpy(), batch.text_mask[i].numpy())
            found = [
                (pair, variant)
                for pair in range(len(prepared.keys))
                for variant in range(NUM_SCENES)
                if letters(*(part[0] for part in prepared.text([pair * NUM_SCENES + variant]))) == said
                and not prepared.held_out[pair]
            ]
            shown = ((batch.x0[i] + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).numpy()
            matching = [pv for pv in found if np.array_equal(picture(prepared, *pv, RENDER_SIZE), shown)]
            assert matching, said
            near = {
                letters(s.numpy(), m.numpy())
                for s, m in zip(batch.neighbor_text[i], batch.neighbor_text_mask[i], strict=True)
            }
            pair = matching[0][0]
            allowed = {
                letters(*(part[0] for part in prepared.text([int(n) * NUM_SCENES])))
                for n in prepared.neighbors[pair]
                if n >= 0
            }
            assert near <= allowed
        assert batch.neighbors.shape == (4, 2, 3, RENDER_SIZE, RENDER_SIZE)
    dropped = torch.cat([source.batch(rng_of(1, s), 32).keep_text for s in range(60)]).float()
    assert 0.82 < float(dropped.mean()) < 0.97


def test_conditioned_crops_of_stored_drawings_are_of_whole_entities() -> None:
    base = marked(4, [3], np.array([[1, 2], [0, 2], [0, 1], [0, 1]], np.int32))
    pictures = {**base.pictures, 256: np.zeros((4, 256, 256, 4), np.uint8)}
    row = replace(preset("tiny-256-neighbors"), stage=1024, groups=8)
    stored = np.full((8, 256, 256, 4), (9, 201, 78, 255), np.uint8)
    source = CropSource(
        prepared=replace(base, pictures=pictures), preset=row, spec=stage(1024), pixels=stored, owners=np.arange(8) % 4
    )
    told = {v for s in range(20) for v in [source._variant(s % 8, rng_of(0, s))]}
    assert told == {v for v, scene in enumerate(base.scenes[0]) if scene.corner is None}
    batch = source.batch(rng_of(0, 0), 32)
    assert batch.text.shape[0] == 8 and bool(batch.neighbor_mask.all())


@pytest.mark.parametrize(
    ("row", "held_out", "said"),
    [
        ("tiny-64", False, "nowhere has no held-out pairs, and evaluation needs some: say `held_out`"),
        ("tiny-64", True, "nowhere has no training pairs, and training needs some: say `held_out`"),
        ("tiny-256", False, "nowhere has no held-out pairs, and evaluation needs some: say `held_out`"),
    ],
)
def test_a_corpus_with_nothing_to_draw_is_refused_before_the_work(row: str, held_out: bool, said: str) -> None:
    prepared = marked(6, range(6) if held_out else (), np.ones((6, 2), np.int32))
    prepared = replace(prepared, pictures=prepared.pictures | {RENDER_SIZE: np.zeros((6, 1, 1, 4), np.uint8)})
    with pytest.raises(ValueError, match=f"--data: {said}"):
        open_source(preset(row), replace(prepared, text_encoder=preset(row).text_encoder))
    source = NeighborSource(prepared=prepared, preset=preset("tiny-64"))
    with pytest.raises(ValueError, match="--data: nowhere has no "):
        (source.batch if held_out else source.held_out_batch)(rng_of(0, 0), 16)


def test_too_few_neighbors_are_told_as_what_they_are() -> None:
    """And not as a want of held-out pairs."""
    alone = marked(6, range(3), np.tile(np.array([1, -1], np.int32), (6, 1)))
    with pytest.raises(
        ValueError, match=r"no training pairs with 2 neighbors or more.*: look up more of them .*knn --k"
    ):
        NeighborSource(prepared=alone, preset=preset("tiny-64")).check()
