"""How a run begins: from published weights, alone in its folder."""

from __future__ import annotations

import fcntl
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, load_stage, publish_stage
from trainer.__main__ import main
from trainer.dataset import Prepared
from trainer.fit import Schedule, open_run
from trainer.presets import Preset
from trainer.sources import NeighborSource
from trainer.state import new_state
from trainer.state_file import write_tensors

CPU = torch.device("cpu")


def publish(folder: Path, row: Preset) -> None:
    state = new_state(row, CPU)
    weights = {name: tensor + 0.5 for name, tensor in state.unet.state_dict().items()}
    publish_stage(folder, row.stage, row.unet, weights, {"step": 30, "examples": 120})


def test_a_new_run_starts_from_published_weights(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    publish(tmp_path / "weights", tiny)
    source = NeighborSource(prepared=prepared, preset=tiny)
    trainer, _ = open_run(tiny, source, tmp_path / "run", CPU, start_from=tmp_path / "weights")
    fresh = new_state(tiny, CPU).unet.state_dict()
    assert (trainer.state.step, trainer.state.examples) == (30, 120)
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


def test_weights_of_another_architecture_are_taken_over_where_they_fit(
    prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    """Each weight is listed as loaded, new, of another shape, or not used; the run counts from 0."""
    theirs = replace(tiny, unet=replace(tiny.unet, widths=(16, 40), blocks=(2, 1), placement=False))
    publish(tmp_path / "weights", theirs)
    source = NeighborSource(prepared=prepared, preset=tiny)
    trainer, _ = open_run(tiny, source, tmp_path / "run", CPU, start_from=tmp_path / "weights")
    found = trainer.warm_start
    assert found is not None and (trainer.state.step, trainer.state.examples) == (found.step, found.examples) == (0, 0)
    assert found.reshaped["dstack.levels.1.residual.0.conv_in.weight"] == [[40, 40, 3, 3], [32, 32, 3, 3]]
    assert "reference.conv_in.weight" in found.new
    assert "dstack.levels.0.residual.1.conv_in.weight" in found.unused
    assert "dstack.levels.0.residual.0.conv_in.weight" in found.loaded
    mine, fresh = trainer.state.unet.state_dict(), new_state(tiny, CPU).unet.state_dict()
    assert {*found.loaded, *found.new, *found.reshaped} == set(mine)
    there = load_stage(tmp_path / "weights", tiny.stage).unet.state_dict()
    for name, tensor in mine.items():
        assert torch.equal(tensor, (there if name in found.loaded else fresh)[name])
        assert torch.equal(trainer.state.average[name], tensor)
    said = "\n".join(found.lines())
    assert all(name in said for name in (*found.new, *found.reshaped, *found.unused))
    assert str(tmp_path / "weights" / "unet_64.safetensors") in said


def test_weights_of_which_none_fits_are_refused(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    state = new_state(tiny, CPU)
    strange = {f"other.{name}": tensor.contiguous() for name, tensor in state.average.items()}
    write_tensors(
        tmp_path / "state-1.safetensors",
        {f"average/{n}": t for n, t in strange.items()},
        {
            "preset": json.dumps(tiny.to_json()),
            "step": "1",
            "examples": "8",
        },
    )
    with pytest.raises(CheckpointError, match="no weight of"):
        open_run(tiny, NeighborSource(prepared=prepared, preset=tiny), tmp_path / "run", CPU, start_from=tmp_path)


def test_weights_that_have_seen_all_examples_are_refused(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """A run that counts on from them would end before its first step."""
    publish(tmp_path / "weights", tiny)
    for total, refused in ((120, True), (121, False)):
        row = replace(tiny, total_examples=total)
        source = NeighborSource(prepared=prepared, preset=row)
        with pytest.raises(CheckpointError, match="has seen 120 examples") if refused else nullcontext():
            open_run(row, source, tmp_path / "run", CPU, start_from=tmp_path / "weights")


def test_a_new_run_starts_from_another_runs_average(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """The newest state that is whole, by the name of its folder or its own."""
    source = NeighborSource(prepared=prepared, preset=tiny)
    first, _ = open_run(tiny, source, tmp_path / "first", CPU)
    for step in range(2):
        first.learn(first.draw(step, step * tiny.batch))
    path = first.save()
    (tmp_path / "first" / "state-00000009.safetensors").write_bytes(path.read_bytes()[:500])
    for place in (tmp_path / "first", path):
        begun, _ = open_run(tiny, source, tmp_path / f"from-{place.name}", CPU, start_from=place)
        assert (begun.state.step, begun.state.examples) == (2, 2 * tiny.batch)
        assert all(torch.equal(t, first.state.average[n]) for n, t in begun.state.unet.state_dict().items())


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
