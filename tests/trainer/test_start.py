"""How a run begins: from published weights, alone in its folder."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, publish_stage
from trainer.__main__ import main
from trainer.dataset import Prepared
from trainer.fit import Schedule, open_run
from trainer.presets import Preset
from trainer.sources import NeighborSource
from trainer.state import new_state

CPU = torch.device("cpu")


def publish(folder: Path, row: Preset) -> None:
    state = new_state(row, CPU)
    weights = {name: tensor + 0.5 for name, tensor in state.unet.state_dict().items()}
    publish_stage(folder, row.stage, row.unet, weights, {"step": 30, "examples": 640})


def test_a_new_run_starts_from_published_weights(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    publish(tmp_path / "weights", tiny)
    source = NeighborSource(prepared=prepared, preset=tiny)
    trainer, _ = open_run(tiny, source, tmp_path / "run", CPU, start_from=tmp_path / "weights")
    fresh = new_state(tiny, CPU).unet.state_dict()
    assert (trainer.state.step, trainer.state.examples) == (30, 640)
    for name, tensor in trainer.state.unet.state_dict().items():
        torch.testing.assert_close(tensor, fresh[name] + 0.5, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(trainer.state.average[name], tensor)


def test_a_run_with_a_state_goes_on_from_that(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    publish(tmp_path / "weights", tiny)
    source = NeighborSource(prepared=prepared, preset=tiny)
    trainer, _ = open_run(tiny, source, tmp_path / "run", CPU)
    trainer.learn(trainer.draw(0, 0))
    trainer.save()
    again, _ = open_run(tiny, source, tmp_path / "run", CPU, start_from=tmp_path / "weights")
    assert again.state.step == 1


def test_weights_of_another_architecture_are_refused(
    prepared: Prepared, tiny: Preset, tiny_256: Preset, tmp_path: Path
) -> None:
    state = new_state(tiny_256, CPU)
    publish_stage(tmp_path, 64, tiny_256.unet, state.unet.state_dict(), {"step": 1, "examples": 1})
    with pytest.raises(CheckpointError, match="another architecture"):
        open_run(tiny, NeighborSource(prepared=prepared, preset=tiny), tmp_path / "run", CPU, start_from=tmp_path)


def test_two_processes_do_not_train_in_one_folder(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer, _ = open_run(tiny, NeighborSource(prepared=prepared, preset=tiny), tmp_path, CPU)
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being trained by another process"):
            trainer.run(Schedule(), lambda examples, figures: None, lambda trainer: None)
    assert not list(tmp_path.glob("state-*")), "nothing was written"


@pytest.mark.parametrize("side", [0, -64, 30, 128])
def test_a_side_that_the_stage_cannot_have_is_named(
    side: int, prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--preset", "tiny-64", "--data", str(prepared_folder), "--run", str(tmp_path), "--side", str(side)]
    assert main(["fit", "--dry-run", *flags]) == 2
    assert f"--side: {side} is not a multiple of 4 up to 64" in capsys.readouterr().err
