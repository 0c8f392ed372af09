"""What a person looks at: pictures that show what they say."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.images import decode_rgb
from common.stages import stage
from trainer.dataset import RENDER_SIZE, Prepared
from trainer.fit import open_run
from trainer.look import look, plot_losses, read_log
from trainer.presets import Preset
from trainer.sources import CropSource, NeighborSource

GAP, CELL, LABEL = 4, 128, 14
CPU = torch.device("cpu")


class Board:
    """Recorder of pictures."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, np.ndarray, int]] = []

    def stepped(self, figures: dict[str, float], examples: int) -> None: ...

    def logged(self, line: dict[str, Any]) -> None: ...

    def saved(self, seconds: float) -> None: ...

    def pictured(self, name: str, picture: np.ndarray, step: int) -> None:
        self.pictures.append((name, picture, step))


def test_first_stage(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """Two neighbors, the truth, with neighbors, without: five rows, a column for each group of four."""
    row = replace(tiny, curriculum=((2**62, 16),))
    trainer, _ = open_run(row, NeighborSource(prepared=prepared, preset=row), tmp_path, CPU)
    trainer.learn(trainer.draw(0, 0))
    board = Board()
    trainer.recorders = [board]
    look(trainer)
    name = f"samples-{row.batch:09d}.png"
    assert {"samples.png", name, "losses.png"} <= {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / name).read_bytes() == (tmp_path / "samples.png").read_bytes()
    sheet = decode_rgb((tmp_path / "samples.png").read_bytes())
    assert sheet.shape == (GAP + 5 * (CELL + GAP + LABEL), GAP + tiny.groups * (CELL + GAP), 3)
    ((told, picture, step),) = board.pictures
    assert (told, step) == ("samples", 1) and np.array_equal(picture, sheet)
    rows = [
        sheet[GAP + LABEL + r * (CELL + GAP + LABEL) : GAP + r * (CELL + GAP + LABEL) + LABEL + CELL] for r in range(5)
    ]
    assert all(np.unique(r.reshape(-1, 3), axis=0).shape[0] > 2 for r in rows)
    assert not np.array_equal(rows[3], rows[4]), "with and without neighbors differ, on the same noise"


def test_super_resolution(prepared: Prepared, tiny_256: Preset, tmp_path: Path) -> None:
    """Bicubic, this stage, the truth."""
    source = CropSource(
        prepared=prepared,
        preset=tiny_256,
        spec=stage(256),
        pixels=prepared.pictures[RENDER_SIZE],
        owners=np.arange(len(prepared.keys)),
    )
    trainer, _ = open_run(tiny_256, source, tmp_path, CPU)
    look(trainer)
    sheet = decode_rgb((tmp_path / "samples.png").read_bytes())
    assert sheet.shape == (GAP + 3 * (CELL + GAP + LABEL), GAP + tiny_256.groups * (CELL + GAP), 3)


def test_looking_does_not_disturb_training(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, curriculum=((2**62, 16),))
    trainer, _ = open_run(row, NeighborSource(prepared=prepared, preset=row), tmp_path, CPU)
    before = {n: t.clone() for n, t in trainer.state.unet.state_dict().items()}
    look(trainer)
    assert all(torch.equal(t, before[n]) for n, t in trainer.state.unet.state_dict().items())
    assert trainer.learn(trainer.draw(0, 0))["skipped"] == 0.0


@pytest.mark.filterwarnings("error::UserWarning")
def test_losses_are_plotted_from_any_log(tmp_path: Path) -> None:
    """None yet, training alone, held-out losses alone, and a last line that a crash cut."""
    train = {"kind": "train", "examples": 8, "loss": 0.5}
    held_out = {"kind": "held_out", "examples": 8, "full": 0.4, "text_only": 0.5}
    for lines in ([], [train], [held_out], [train, held_out]):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "log.jsonl").write_text(text + '{"kind": "tra')
        (tmp_path / "losses.png").unlink(missing_ok=True)
        plot_losses(tmp_path)
        assert decode_rgb((tmp_path / "losses.png").read_bytes()).shape[0] > 100
        assert read_log(tmp_path) == lines


def test_no_log_is_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path / "nowhere") == []


def test_a_full_disk_leaves_the_last_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot that cannot be finished is not half there."""
    (tmp_path / "losses.png").write_bytes(b"the one before")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        plot_losses(tmp_path)
    assert (tmp_path / "losses.png").read_bytes() == b"the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]
