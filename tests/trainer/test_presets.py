"""Every named run is one complete configuration that fits its stage."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from common.diffusion.schedule import log_snr
from common.stages import stage
from common.unet.unet import UNet
from trainer.dataset import RENDER_SIZE, open_prepared
from trainer.presets import PRESETS, Preset, preset

ROWS = [pytest.param(p, id=name) for name, p in PRESETS.items()]


def parameters(row: Preset) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(row.unet).parameters())


@pytest.mark.parametrize("row", ROWS)
def test_rows_build_without_memory_and_report_their_size(row: Preset) -> None:
    count = parameters(row)
    print(f"{row.name}: {count:,} parameters")
    assert 10_000 < count < 20_000_000
    with torch.device("meta"):
        assert all(p.is_meta for p in UNet(row.unet).parameters())


def test_the_demonstration_weights_fit_the_repository() -> None:
    """fp16, 30 MiB together at most."""
    demo = [p for name, p in PRESETS.items() if name.startswith("demo-")]
    assert sorted(p.stage for p in demo) == [64, 256, 1024]
    assert sum(2 * parameters(p) for p in demo) < 30 * 2**20


@pytest.mark.parametrize("row", ROWS)
def test_rows_fit_their_stage(row: Preset) -> None:
    spec = stage(row.stage)
    assert PRESETS[row.name] is row
    assert row.unet.scale == spec.scale
    assert row.unet.uses_neighbors == spec.neighbors == (row.neighbors > 0)
    assert spec.size % row.unet.granularity == 0
    for _, side in row.curriculum:
        assert side % row.unet.granularity == 0 and side <= spec.size
        assert side % (row.unet.patch * 2) == 0
    assert row.curriculum[-1][0] > row.total_examples, "the last side goes on"
    if spec.neighbors:
        assert row.text_dropout == row.neighbor_dropout == 0.1, "Re-Imagen, section 3.3"
        assert row.neighbors == 2


@pytest.mark.parametrize("row", ROWS)
def test_pictures_of_every_side_of_the_curriculum_are_prepared(row: Preset, prepared_folder) -> None:
    """Whole pictures, and the half-sized entity of a corner scene."""
    there = set(open_prepared(prepared_folder).pictures)
    for _, side in row.curriculum:
        if row.unet.uses_neighbors:
            assert {side, side // 2} <= there
        else:
            assert side <= RENDER_SIZE


@pytest.mark.parametrize("row", ROWS)
def test_clean_low_resolution_is_within_what_training_saw(row: Preset) -> None:
    spec = stage(row.stage)
    assert log_snr(spec.schedule, spec.augmentation) >= log_snr(spec.schedule, spec.train_augmentation)


def test_the_curriculum_changes_side_at_its_steps(tiny: Preset) -> None:
    row = replace(tiny, curriculum=((64, 16), (128, 32), (2**62, 64)))
    assert [row.side(n) for n in (0, 63, 64, 127, 128, 10**9)] == [16, 16, 32, 32, 64, 64]
    assert replace(row, curriculum=((64, 16), (128, 32))).side(500) == 32, "the last side goes on"
    assert tiny.batch == tiny.groups * tiny.draws


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_json(row: Preset) -> None:
    document = json.loads(json.dumps(row.to_json()))
    assert set(document) == {f.name for f in fields(Preset)}
    assert document["unet"]["widths"] == list(row.unet.widths)


def test_unknown_rows_are_named() -> None:
    with pytest.raises(ValueError, match="preset: 'demo-128'"):
        preset("demo-128")
