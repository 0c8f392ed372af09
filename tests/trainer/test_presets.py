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
    assert count > 10_000
    with torch.device("meta"):
        assert all(p.is_meta for p in UNet(row.unet).parameters())


def test_the_demonstration_weights_fit_the_repository() -> None:
    """fp16, 30 MiB together at most."""
    demo = [p for name, p in PRESETS.items() if name.startswith("demo-")]
    assert sorted(p.stage for p in demo) == [64, 256, 1024]
    assert sum(2 * parameters(p) for p in demo) < 30 * 2**20


@pytest.mark.parametrize(
    ("name", "count"), [("paper-64", 2.5e9), ("paper-64-small", 1.4e9), ("paper-256", 750e6), ("paper-1024", 400e6)]
)
def test_the_papers_sizes(name: str, count: float) -> None:
    """Re-Imagen, section 4.1."""
    assert parameters(preset(name)) == pytest.approx(count, rel=0.03)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("paper-")])
def test_the_papers_training(name: str) -> None:
    """Re-Imagen, section 4.1; Imagen, section 2.4 and appendix B."""
    row = preset(name)
    assert row.optimizer == ("adafactor" if row.stage == 64 else "adam")
    assert (row.learning_rate, row.neighbors, row.unet.text_width) == (1e-4, 2, 4096)
    assert row.total_examples // row.batch == 200_000
    assert "t5-v1_1-xxl" in row.text_encoder
    assert row.unet.skip_scale == pytest.approx(0.5**0.5)
    assert any(row.unet.text_attention) and any(row.unet.neighbor_attention)
    assert row.side(0) == min(row.stage, 256), "the last stage is trained on crops of 64 -> 256"
    if row.unet.scale > 1:
        assert row.unet.patch == 1 and row.unet.blocks[0] == 0, "Efficient U-Net: no block on the picture's own grid"
        assert list(row.unet.blocks) == sorted(row.unet.blocks), "parameters lie at low resolution"
    if row.stage == 1024:
        assert not any(row.unet.attention) and not row.unet.positions


def test_an_average_is_one_or_the_other(tiny: Preset) -> None:
    assert replace(tiny, ema="post-hoc", ema_decay=0.0, ema_lengths=(0.05, 0.1)).ema_lengths == (0.05, 0.1)
    for change in ({"ema": "post-hoc"}, {"ema_decay": 0.0}, {"ema_lengths": (0.1,)}):
        with pytest.raises(ValueError, match=r"preset\.ema"):
            replace(tiny, **change)
    with pytest.raises(ValueError, match="accumulation: 3 does not divide groups 4"):
        replace(tiny, accumulation=3)


@pytest.mark.parametrize("row", ROWS)
def test_rows_fit_their_stage(row: Preset) -> None:
    spec = stage(row.stage)
    assert PRESETS[row.name] is row
    assert row.unet.scale == spec.scale
    assert row.unet.uses_neighbors == (row.neighbors > 0)
    assert row.unet.uses_neighbors or spec.scale > 1, "the first stage is what draws the entity"
    assert spec.size % row.unet.granularity == 0
    for _, side in row.curriculum:
        assert side % row.unet.granularity == 0 and side <= spec.size
        assert side % (row.unet.patch * 2) == 0
    assert row.curriculum[-1][0] > row.total_examples, "the last side goes on"
    if row.unet.uses_neighbors:
        assert row.text_dropout == row.neighbor_dropout == 0.1, "Re-Imagen, section 3.3"
        assert row.neighbors == 2


@pytest.mark.parametrize("row", ROWS)
def test_pictures_of_every_side_of_the_curriculum_are_prepared(row: Preset, prepared_folder) -> None:
    """Whole pictures, and the half-sized entity of a corner scene."""
    there = set(open_prepared(prepared_folder).pictures)
    for _, side in row.curriculum:
        assert side <= RENDER_SIZE
        if row.unet.uses_neighbors:
            assert {side, side // 2} <= there


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
