"""The training loop: it learns, it resumes to the bit, and looking at it changes nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import load_stage
from common.stages import stage
from trainer.batches import rng_of
from trainer.dataset import RENDER_SIZE, Prepared
from trainer.fit import Schedule, Trainer, open_run, rate_at
from trainer.loss import paired_losses
from trainer.presets import Preset
from trainer.publish import publish
from trainer.sources import CropSource, NeighborSource, Source

CPU = torch.device("cpu")
NEVER = Schedule(log_every_s=1e9, evaluate_every_s=1e9, save_every_s=1e9)
ALWAYS = Schedule(log_every_s=0.0, evaluate_every_s=0.0, save_every_s=0.0)


def no_look(trainer: Trainer) -> None:
    """Nobody looks."""


def no_show(examples: int, figures: dict[str, float]) -> None:
    """Nothing is shown."""


def opened(prepared: Prepared, row: Preset, folder: Path) -> Trainer:
    source: Source
    if row.unet.uses_neighbors:
        source = NeighborSource(prepared=prepared, preset=row)
    else:
        pixels, owners = prepared.pictures[RENDER_SIZE], np.arange(len(prepared.keys))
        source = CropSource(prepared=prepared, preset=row, spec=stage(row.stage), pixels=pixels, owners=owners)
    return open_run(row, source, folder, CPU)[0]


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer, by name."""
    state = trainer.state
    found = {f"weights/{n}": t.clone() for n, t in state.unet.state_dict().items()}
    found |= {f"average/{n}": t.clone() for n, t in state.average.items()}
    for name, parameter in state.unet.named_parameters():
        found |= {f"optimizer/{k}/{name}": t.clone() for k, t in state.optimizer.state[parameter].items()}
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ, e.g. {different[:3]}"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["tiny", "tiny_256"])
def test_a_fit_lowers_the_loss(name: str, prepared: Prepared, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """On fixed batches of what it trains on, with fixed times and noise."""
    row: Preset = request.getfixturevalue(name)
    side = 16 if row.unet.uses_neighbors else 32
    row = replace(row, curriculum=((2**62, side),), total_examples=45 * row.batch, learning_rate=5e-3)
    trainer = opened(prepared, row, tmp_path)
    fixed = [trainer.source.batch(rng_of(99, i), row.side(0)) for i in range(3)]
    before = paired_losses(trainer.state.unet, trainer.spec, fixed)["full"]
    trainer.run(NEVER, no_show, no_look)
    after = paired_losses(trainer.state.unet, trainer.spec, fixed)["full"]
    assert trainer.state.examples == row.total_examples
    assert after < 0.9 * before
    with trainer.averaged() as unet:
        assert paired_losses(unet, trainer.spec, fixed)["full"] < 0.97 * before, "the average learns too"


@pytest.mark.parametrize("name", ["tiny", "tiny_256"])
def test_a_resumed_run_is_the_same_run(
    name: str, prepared: Prepared, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """10 steps straight, and 4 steps, a new process's view of the disk, 6 more: to the bit, through a change of side."""
    row: Preset = request.getfixturevalue(name)
    row = replace(row, total_examples=10 * row.batch, warmup_steps=6, decay_examples=7 * row.batch)
    if row.unet.uses_neighbors:
        row = replace(row, curriculum=((6 * row.batch, 16), (2**62, 32)))
    straight = opened(prepared, row, tmp_path / "straight")
    straight.run(NEVER, no_show, no_look)
    first = opened(prepared, replace(row, total_examples=4 * row.batch), tmp_path / "parts")
    first.run(NEVER, no_show, no_look)
    second = opened(prepared, row, tmp_path / "parts")
    assert (second.state.step, second.state.examples) == (4, 4 * row.batch)
    assert_same(snapshot(second), snapshot(first))
    second.run(NEVER, no_show, no_look)
    assert (second.state.step, second.state.examples) == (10, 10 * row.batch)
    assert_same(snapshot(second), snapshot(straight))
    assert_same(snapshot(opened(prepared, row, tmp_path / "parts")), snapshot(straight))


def test_looking_logging_and_saving_change_nothing(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, total_examples=2 * tiny.batch, curriculum=((2**62, 16),))
    quiet, watched = (opened(prepared, row, tmp_path / name) for name in ("quiet", "watched"))
    quiet.run(NEVER, no_show, no_look)
    watched.run(ALWAYS, no_show, lambda trainer: trainer.held_out_losses(1) and None)
    assert_same(snapshot(watched), snapshot(quiet))
    assert watched.state.unet.training


def test_batches_drawn_ahead_are_those_of_their_steps(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer = opened(prepared, tiny, tmp_path)
    coming = trainer.batches()
    for step in range(4):
        batch, expected = next(coming), trainer.draw(step, step * tiny.batch)
        for name, value in vars(batch).items():
            assert torch.equal(value, getattr(expected, name)), name
    coming.close()  # type: ignore[attr-defined]


def test_a_gradient_that_is_not_finite_changes_nothing(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer = opened(prepared, tiny, tmp_path)
    for step in range(3):
        trainer.learn(trainer.draw(step, step * tiny.batch))
    before = snapshot(trainer)
    batch = trainer.draw(3, 3 * tiny.batch)
    batch.x0[0, 0, 0, 0] = float("nan")
    figures = trainer.learn(batch)
    assert figures["skipped"] == 1.0
    assert trainer.state.step == 4 and trainer.state.examples == 4 * tiny.batch, "the run goes on to the next batch"
    assert_same(snapshot(trainer), before)
    assert all(p.grad is None for p in trainer.state.unet.parameters())
    assert trainer.learn(trainer.draw(4, 4 * tiny.batch))["skipped"] == 0.0
    assert all(torch.isfinite(t).all() for t in snapshot(trainer).values())


def test_the_learning_rate_warms_up_and_decays(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, warmup_steps=4, decay_examples=5 * tiny.batch, learning_rate=1e-3)
    trainer = opened(prepared, row, tmp_path)
    batch = trainer.draw(0, 0)
    rates = [trainer.learn(batch)["learning_rate"] for _ in range(9)]
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3]
    expected += [1e-3 * (5 / examples) ** 0.5 for examples in (6, 7, 8)]
    assert rates == pytest.approx(expected)
    assert trainer.state.optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1])


def test_gradients_are_clipped(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer = opened(prepared, replace(tiny, clip_norm=1e-3), tmp_path)
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for p in trainer.state.unet.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    trainer.state.optimizer.register_step_pre_hook(measure)
    figures = trainer.learn(trainer.draw(0, 0))
    assert figures["gradient_norm"] > 1e-2, "what is reported is the norm before clipping"
    assert norms == pytest.approx([1e-3], rel=1e-3)


def test_held_out_losses_are_of_the_average_and_the_same_every_time(
    prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    trainer = opened(prepared, tiny, tmp_path)
    trainer.learn(trainer.draw(0, 0))
    before = snapshot(trainer)
    losses = trainer.held_out_losses()
    assert losses == trainer.held_out_losses()
    assert_same(snapshot(trainer), before)
    for tensor in trainer.state.average.values():
        tensor.mul_(1.5)
    assert trainer.held_out_losses() != losses


def test_average_is_put_back_even_when_looking_fails(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer = opened(prepared, tiny, tmp_path)
    for _ in range(2):
        trainer.learn(trainer.draw(0, 0))
    before = snapshot(trainer)

    def look() -> None:
        with trainer.averaged() as unet:
            assert torch.equal(unet.stem.weight, trainer.state.average["stem.weight"])
            assert not unet.training
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        look()
    assert_same(snapshot(trainer), before)
    assert trainer.state.unet.training


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "flag"])
def test_asked_to_stop_it_saves_and_can_be_resumed(how: str, prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    trainer = opened(prepared, tiny, tmp_path)
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.getsignal(n) for n in numbers]

    def show(examples: int, figures: dict[str, float]) -> None:
        if examples == 3 * tiny.batch:
            if how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif how == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                trainer.stopping = True

    trainer.run(NEVER, show, no_look)
    assert [signal.getsignal(n) for n in numbers] == previous
    again = opened(prepared, tiny, tmp_path)
    assert again.state.step == 3
    assert_same(snapshot(again), snapshot(trainer))


def test_the_log_is_lines_of_json(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, total_examples=3 * tiny.batch)
    opened(prepared, row, tmp_path).run(
        Schedule(log_every_s=0.0, evaluate_every_s=1e9, save_every_s=1e9), no_show, no_look
    )
    lines = lines_of(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("held_out", 3),
    ]
    assert {"time", "examples", "side", "loss", "gradient_norm", "learning_rate", "examples_per_s"} <= set(lines[0])
    assert {"full", "text_only", "neighbors_only", "none", "wrong_neighbors"} <= set(lines[-1])
    assert all(line["examples_per_s"] > 0 for line in lines[:-1])


def test_every_step_is_in_a_train_line_however_often_it_is_evaluated(
    prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    """Evaluations come more often than lines; the last steps come to an end before either."""
    row = replace(tiny, total_examples=5 * tiny.batch, curriculum=((2**62, 16),))
    told: list[tuple[int, float]] = []
    trainer = opened(prepared, row, tmp_path)
    trainer.held_out_losses = lambda num_batches=4: {"full": 0.5}  # type: ignore[method-assign]
    trainer.run(
        replace(NEVER, evaluate_every_steps=2),
        lambda examples, figures: told.append((examples, figures["loss"])),
        no_look,
    )
    lines = lines_of(tmp_path)
    expected = [("train", 2), ("held_out", 2), ("train", 4), ("held_out", 4), ("train", 5), ("held_out", 5)]
    assert [(line["kind"], line["step"]) for line in lines] == expected
    losses = [loss for _, loss in told]
    means = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == pytest.approx(means)


def test_what_was_logged_after_the_state_that_it_goes_on_from_is_cut(
    prepared: Prepared, tiny: Preset, tmp_path: Path
) -> None:
    """As after `kill -9`, once before a state was saved and once after."""
    row = replace(tiny, curriculum=((2**62, 16),))
    each = Schedule(log_every_s=0.0, evaluate_every_s=1e9, save_every_s=1e9)
    killed = opened(prepared, row, tmp_path)
    killed.log({"kind": "train", "loss": 1.0})
    for end in (2, 3):
        trainer = opened(prepared, replace(row, total_examples=end * row.batch), tmp_path)
        trainer.held_out_losses = lambda num_batches=4: {"full": 0.5}  # type: ignore[method-assign]
        trainer.run(each, no_show, no_look)
        trainer.state.step += 1
        trainer.log({"kind": "train", "loss": 1.0})
    steps = [(line["kind"], line["step"]) for line in lines_of(tmp_path)[:-1]]
    assert steps == [("train", 1), ("train", 2), ("held_out", 2), ("train", 3), ("held_out", 3)]


def test_a_damaged_state_is_passed_over_by_name(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, total_examples=2 * tiny.batch)
    trainer = opened(prepared, row, tmp_path)
    trainer.run(replace(NEVER, save_every_s=0.0), no_show, no_look)
    newest = sorted(tmp_path.glob("state-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    trainer, skipped = open_run(row, NeighborSource(prepared=prepared, preset=row), tmp_path, CPU)
    assert trainer.state.step == 1
    assert len(skipped) == 1 and newest.name in skipped[0]
    assert newest.exists(), "only who holds the folder renames what is in it"
    trainer.run(NEVER, no_show, no_look)
    assert newest.with_suffix(".damaged").stat().st_size == 1000 and newest.exists()


def test_one_run_folder_has_one_writer(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """While a run goes on; afterwards, however it ended, the folder is free."""
    row = replace(tiny, total_examples=2 * tiny.batch)
    trainer, other = opened(prepared, row, tmp_path), opened(prepared, row, tmp_path)
    refusals: list[str] = []

    def show(examples: int, figures: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="another process") as caught:
            other.run(NEVER, no_show, no_look)
        refusals.append(str(caught.value))
        raise RuntimeError("the run breaks off")

    with pytest.raises(RuntimeError, match="breaks off"):
        trainer.run(NEVER, show, no_look)
    assert refusals and all(str(tmp_path) in line for line in refusals)
    other.run(NEVER, no_show, no_look)
    assert other.state.step == 2


def test_what_another_process_has_saved_since_is_not_undone(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    row = replace(tiny, total_examples=2 * tiny.batch)
    first, late = opened(prepared, row, tmp_path), opened(prepared, row, tmp_path)
    first.run(NEVER, no_show, no_look)
    told = lines_of(tmp_path)
    with pytest.raises(RuntimeError, match="opened at step 0; another process has saved step 2 since"):
        late.run(NEVER, no_show, no_look)
    assert lines_of(tmp_path) == told and opened(prepared, row, tmp_path).state.step == 2


def test_a_new_run_may_start_from_published_weights(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """It counts on from what they had seen; a run with a state of its own goes on from that."""
    source = NeighborSource(prepared=prepared, preset=tiny)
    first, _ = open_run(tiny, source, tmp_path / "first", CPU)
    for step in range(3):
        first.learn(first.draw(step, step * tiny.batch))
    publish(first, tmp_path / "weights", prepared.fingerprint)
    publish(first, tmp_path / "earlier", prepared.fingerprint, average=first.state.average, step=2)
    card = load_stage(tmp_path / "earlier", 64).trained
    assert (card["step"], card["examples"]) == (2, 2 * tiny.batch), "of the weights, not of the state"
    begun, _ = open_run(tiny, source, tmp_path / "second", CPU, tmp_path / "weights")
    assert (begun.state.step, begun.state.examples) == (3, 3 * tiny.batch)
    for name, tensor in begun.state.unet.state_dict().items():
        assert torch.equal(tensor, first.state.average[name].half().float()), name
        assert torch.equal(tensor, begun.state.average[name]), name
    assert all(p.requires_grad for p in begun.state.unet.parameters()) and begun.state.unet.training
    begun.learn(begun.draw(3, 3 * tiny.batch))
    begun.save()
    assert open_run(tiny, source, tmp_path / "second", CPU, tmp_path / "weights")[0].state.step == 4


def test_the_rate_warms_up_decays_and_cools_down_to_zero(tiny: Preset) -> None:
    row = replace(tiny, warmup_steps=10, decay_examples=400, total_examples=1600, cooldown_examples=400)
    assert rate_at(row, 4, 40) == pytest.approx(0.5)
    assert rate_at(row, 99, 400) == 1.0
    assert rate_at(row, 99, 1200) == pytest.approx((400 / 1200) ** 0.5), "the cooldown has not begun"
    assert rate_at(row, 99, 1500) == pytest.approx((400 / 1500) ** 0.5 / 4)
    assert rate_at(row, 99, 1600) == 0.0
