"""Batches of the first stage: who is drawn, who is seen beside whom, and what never is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.images import to_unit
from common.scenes import CORNERS, Scene, compose
from tests.trainer.shapes import letters, marked, shown
from trainer.batches import TIME_MARGIN, Batch, picture, placement, rng_of
from trainer.dataset import NUM_SCENES, Prepared
from trainer.presets import Preset
from trainer.sources import NeighborSource

SIDE = 16
# Pairs 0..11: three entities of four styles each; 12..15 one more entity, held out.
GROUPS = [range(0, 4), range(4, 8), range(8, 12), range(12, 16)]
HELD_OUT = set(GROUPS[3])


def ring(*, with_held_out: bool) -> np.ndarray:
    """Each pair's nearest: the others of its entity, then all of the next entity's."""
    rows = []
    for pair in range(16):
        own = pair // 4
        order = [p for p in GROUPS[own] if p != pair]
        for step in (1, 2, 3):
            order += list(GROUPS[(own + step) % 4])
        if not with_held_out and pair not in HELD_OUT:
            order = [p for p in order if p not in HELD_OUT]
        rows.append((order + [-1] * 12)[:8])
    return np.array(rows)


def source(tiny: Preset, *, with_held_out: bool = False) -> NeighborSource:
    return NeighborSource(prepared=marked(16, sorted(HELD_OUT), ring(with_held_out=with_held_out)), preset=tiny)


def neighbors_shown(batch: Batch) -> list[list[int]]:
    count = batch.neighbors.shape[1]
    found = shown(batch.neighbors.flatten(0, 1))
    return [found[i : i + count] for i in range(0, len(found), count)]


def many(tiny: Preset, num: int = 60, **options: bool) -> list[Batch]:
    drawn = source(tiny, **options)
    return [drawn.batch(rng_of(0, step), SIDE) for step in range(num)]


def test_shapes_and_ranges(tiny: Preset) -> None:
    batch = many(tiny, 1)[0]
    assert batch.x0.shape == batch.eps.shape == (tiny.batch, 3, SIDE, SIDE)
    assert batch.neighbors.shape == (tiny.groups, 2, 3, SIDE, SIDE)
    assert batch.low_res.shape == (tiny.batch, 3, 0, 0)
    assert batch.x0.min() >= -1.0 and batch.x0.max() <= 1.0
    assert batch.neighbor_mask.all() and batch.neighbor_mask.shape == (tiny.groups, 2)
    assert batch.text.shape[:2] == batch.text_mask.shape
    assert batch.neighbor_text.shape[:3] == batch.neighbor_text_mask.shape
    assert {v.dtype for v in vars(batch).values()} == {torch.float32, torch.bool, torch.int64}


def test_held_out_pairs_are_never_trained_on(tiny: Preset) -> None:
    """Neither as the picture to draw, nor as a neighbor, nor by their captions."""
    for batch in many(tiny, 150):
        assert not HELD_OUT & set(shown(batch.x0))
        assert not HELD_OUT & {n for found in neighbors_shown(batch) for n in found}


def test_held_out_pairs_are_never_trained_on_though_they_be_named_as_neighbors(tiny: Preset) -> None:
    """A neighbors file that names them (another tool's, another rule's) does not bring them into training."""
    for batch in many(tiny, 150, with_held_out=True):
        assert not HELD_OUT & set(shown(batch.x0))
        assert not HELD_OUT & {n for found in neighbors_shown(batch) for n in found}


def test_held_out_batches_draw_held_out_pairs_alone(tiny: Preset) -> None:
    """What is measured on held-out pairs is not diluted with pairs that were trained on."""
    drawn = source(tiny)
    for step in range(150):
        targets = shown(drawn.held_out_batch(rng_of(1, step), SIDE).x0)
        assert set(targets) <= HELD_OUT


def test_members_of_a_group_share_their_neighbors_and_none_is_its_own(tiny: Preset) -> None:
    drawn = source(tiny)
    nearest = drawn.prepared.neighbors
    for batch in [drawn.batch(rng_of(0, s), SIDE) for s in range(60)] + [
        drawn.held_out_batch(rng_of(1, s), SIDE) for s in range(60)
    ]:
        targets, sets = shown(batch.x0), neighbors_shown(batch)
        assert batch.group.tolist() == [g for g in range(tiny.groups) for _ in range(tiny.draws)]
        for target, group in zip(targets, batch.group.tolist(), strict=True):
            assert target not in sets[group], "the picture to draw is not shown beside"
            assert len(set(sets[group])) == 2
            assert set(sets[group]) <= set(nearest[target].tolist()), "each is a neighbor of every member"


def test_companions_are_drawn(tiny: Preset) -> None:
    """An entity in several styles from one encoded set: often the members of a group are different pairs."""
    drawn = [shown(b.x0) for b in many(tiny)]
    different = np.mean([[t[i] != t[i + 1] for i in range(0, len(t), 2)] for t in drawn])
    assert 0.2 < different < 0.9


def test_every_training_pair_and_every_near_neighbor_is_seen(tiny: Preset) -> None:
    batches = many(tiny, 100)
    assert {p for b in batches for p in shown(b.x0)} == set(range(12))
    assert {n for b in batches for found in neighbors_shown(b) for n in found} == set(range(12))


def test_captions_belong_to_the_pictures(prepared: Prepared, tiny: Preset) -> None:
    """On real shapes: the caption read is the pair's in the scene shown; neighbors are on white with theirs."""
    batch = NeighborSource(prepared=prepared, preset=tiny).batch(rng_of(0, 3), SIDE)
    captions = {
        letters(*(x[0] for x in prepared.text([i]))): (i // NUM_SCENES, i % NUM_SCENES)
        for i in range(len(prepared.keys) * NUM_SCENES)
    }
    for row in range(tiny.batch):
        pair, variant = captions[letters(batch.text[row].numpy(), batch.text_mask[row].numpy())]
        expected = compose(lambda n, p=pair: prepared.pictures[n][p], prepared.scenes[pair][variant], SIDE)
        np.testing.assert_array_equal(batch.x0[row].movedim(0, -1).numpy(), to_unit(expected))
    for group in range(tiny.groups):
        for k in range(2):
            said = letters(batch.neighbor_text[group, k].numpy(), batch.neighbor_text_mask[group, k].numpy())
            pair, variant = captions[said]
            assert variant == 0
            expected = picture(prepared, pair, 0, SIDE)
            np.testing.assert_array_equal(batch.neighbors[group, k].movedim(0, -1).numpy(), to_unit(expected))


def test_too_few_neighbors_are_masked(tiny: Preset) -> None:
    """With one neighbor where two are wanted, the second slot is there and off."""
    prepared = marked(4, [3], np.array([[1, -1], [0, -1], [0, -1], [-1, -1]]))
    wants_one = replace(tiny, neighbors=1)
    batch = NeighborSource(prepared=prepared, preset=wants_one).batch(rng_of(0, 0), SIDE)
    assert batch.neighbors.shape[1] == 1 and batch.neighbor_mask.all()
    assert not set(shown(batch.x0)) & {3}


def test_dropout_is_at_its_rate_and_independent(tiny: Preset) -> None:
    batches = many(tiny, 250)
    text = torch.cat([~b.keep_text for b in batches]).float()
    neighbors = torch.cat([~b.keep_neighbors for b in batches]).float()
    assert len(text) == 250 * tiny.batch
    for dropped in (text, neighbors):
        assert abs(float(dropped.mean()) - 0.1) < 0.025
    assert abs(float((text * neighbors).mean()) - 0.01) < 0.008, "both one time in a hundred"
    assert torch.corrcoef(torch.stack([text, neighbors]))[0, 1].abs() < 0.08


def test_dropout_knobs_are_consumed(tiny: Preset) -> None:
    for text, neighbors in ((1.0, 0.0), (0.0, 1.0)):
        preset = replace(tiny, text_dropout=text, neighbor_dropout=neighbors)
        batch = many(preset, 1)[0]
        assert batch.keep_text.all() == (text == 0.0) and batch.keep_text.any() == (text == 0.0)
        assert batch.keep_neighbors.all() == (neighbors == 0.0) and batch.keep_neighbors.any() == (neighbors == 0.0)


def test_times_are_stratified(tiny: Preset) -> None:
    """One u in each of B equal parts of [0, 1], in no order; t = u^time_exponent."""
    ordered = 0
    for batch in many(tiny, 40):
        parts = np.floor(batch.t.numpy().astype(np.float64) ** (1 / tiny.time_exponent) * tiny.batch + 1e-4).clip(
            0, tiny.batch - 1
        )
        assert sorted(parts.tolist()) == list(range(tiny.batch))
        assert batch.t.min() >= TIME_MARGIN and batch.t.max() <= 1.0
        ordered += bool((np.diff(parts) > 0).all())
    assert ordered == 0


@pytest.mark.parametrize("corner", [None, *CORNERS])
def test_placement_finds_the_drawing(corner: str | None) -> None:
    """Each pixel of the small entity is the pixel of the whole drawing at the placed place."""
    whole = np.zeros((32, 32, 4), np.uint8)
    whole[..., 3] = 255
    whole[..., 0], whole[..., 1] = np.mgrid[:32, :32] * 4
    scene = Scene(color="red", corner=corner)
    picture = compose(lambda side: whole[:: 32 // side, :: 32 // side], scene, 32)
    zoom_row, zoom_column, shift_row, shift_column, *color = placement(scene)
    np.testing.assert_allclose(color, np.array(scene.rgb) / 127.5 - 2.0)  # of the ground, less white
    for row, column in np.ndindex(32, 32):
        y = (1 + zoom_row) * ((row + 0.5) / 32 - 0.5) + 0.5 + shift_row
        x = (1 + zoom_column) * ((column + 0.5) / 32 - 0.5) + 0.5 + shift_column
        if 0 < y < 1 and 0 < x < 1:
            assert abs(picture[row, column, 0] / 4 - (y * 32 - 0.5)) <= 0.5
            assert abs(picture[row, column, 1] / 4 - (x * 32 - 0.5)) <= 0.5
        else:
            assert tuple(picture[row, column]) == scene.rgb


def test_noise_is_standard_and_new(tiny: Preset) -> None:
    batches = many(tiny, 20)
    noise = torch.stack([b.eps for b in batches])
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1.0) < 0.02
    assert torch.unique(noise[:, :, 0, 0, 0]).numel() == noise.shape[0] * noise.shape[1]


def test_a_step_is_its_seed_and_number(tiny: Preset) -> None:
    drawn = source(tiny)
    first, again = drawn.batch(rng_of(5, 9), SIDE), drawn.batch(rng_of(5, 9), SIDE)
    for name, value in vars(first).items():
        torch.testing.assert_close(getattr(again, name), value, atol=0, rtol=0)
    for other in (rng_of(5, 10), rng_of(6, 9)):
        assert not torch.equal(drawn.batch(other, SIDE).eps, first.eps)
    assert not np.array_equal(rng_of(1, 0).random(4), rng_of(0, 1).random(4))
