"""How a step's passes are computed, as the preset says: in what precision, remembering what, in how many parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.dataset import Prepared
from trainer.fit import Trainer, open_run
from trainer.presets import Preset
from trainer.sources import NeighborSource


def first_step(prepared: Prepared, row: Preset, folder: Path) -> tuple[Trainer, dict[str, float], int]:
    """A run after its first step, the step's figures, and the bytes that its forward passes remembered."""
    row = replace(row, curriculum=((2**62, 16),))
    trainer, _ = open_run(row, NeighborSource(prepared=prepared, preset=row), folder, torch.device("cpu"))
    seen: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        figures = trainer.learn(trainer.draw(0, 0))
    return trainer, figures, sum(seen.values())


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([t.flatten() for t in trainer.state.unet.state_dict().values()])


@pytest.mark.parametrize("changed", [{"activation_checkpointing": True}, {"accumulation": 2}, {"accumulation": 4}])
def test_what_saves_memory_changes_no_step(
    changed: dict[str, Any], prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    plain, figures, _ = first_step(prepared, tiny, tmp_path / "plain")
    other, theirs, _ = first_step(prepared, replace(tiny, **changed), tmp_path / "other")
    assert theirs["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert theirs["gradient_norm"] == pytest.approx(figures["gradient_norm"], rel=1e-4)
    before = torch.cat([t.flatten() for t in first_weights(prepared, tiny, tmp_path)])
    apart, moved = (weights(other) - weights(plain)).norm(), (weights(plain) - before).norm()
    assert moved > 0 and apart < 0.02 * moved


def first_weights(prepared: Prepared, row: Preset, folder: Path) -> list[torch.Tensor]:
    trainer, _ = open_run(row, NeighborSource(prepared=prepared, preset=row), folder / "new", torch.device("cpu"))
    return list(trainer.state.unet.state_dict().values())


def test_checkpointed_blocks_are_not_remembered(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """What further blocks add to what is remembered: of a residual block and its attentions, what goes in alone."""
    added = {}
    for checkpointing in (False, True):
        sizes = []
        for blocks in (1, 3):
            row = replace(tiny, unet=replace(tiny.unet, blocks=(blocks, 1)), activation_checkpointing=checkpointing)
            sizes.append(first_step(prepared, row, tmp_path / f"{checkpointing}-{blocks}")[2])
        added[checkpointing] = sizes[1] - sizes[0]
    assert 0 < added[True] < 0.4 * added[False], added


def test_the_precision_is_the_presets(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """Passes in bfloat16 are near those in float32, and not the same; weights and averages stay float32."""
    _, exact, _ = first_step(prepared, replace(tiny, precision="float32"), tmp_path / "32")
    _, auto, _ = first_step(prepared, tiny, tmp_path / "auto")
    trainer, rounded, _ = first_step(prepared, replace(tiny, precision="bfloat16"), tmp_path / "16")
    assert auto["loss"] == exact["loss"], "on a CPU"
    assert rounded["loss"] != exact["loss"] and rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert rounded["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)
    tensors = [*trainer.state.unet.state_dict().values(), *trainer.state.average.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
