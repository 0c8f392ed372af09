"""A run's state on disk: whole, the newest readable one, and never lost to a damaged one."""

from __future__ import annotations

import json
import os
import resource
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import CheckpointError
from common.unet.config import LATER
from trainer import state as state_module
from trainer.presets import Preset, preset
from trainer.state import KEPT, RunState, load_state, new_state, resume, save_state, set_aside
from trainer.state_file import read_tensors

CPU = torch.device("cpu")
AVERAGED = preset("tiny-64")


def moved(state: RunState, steps: int = 1) -> RunState:
    """The state after steps with made-up gradients."""
    for _ in range(steps):
        for parameter in state.unet.parameters():
            parameter.grad = torch.sin(parameter.detach() * 37.0 + state.step)
        state.optimizer.step()
        state.step += 1
        state.examples += 8
        state.update_averages(AVERAGED)
    return state


def assert_same(a: RunState, b: RunState) -> None:
    """To the bit."""
    assert (a.step, a.examples) == (b.step, b.examples)
    for name, tensor in a.unet.state_dict().items():
        assert torch.equal(tensor, b.unet.state_dict()[name]), f"weights {name}"
    assert set(a.average) == set(b.average)
    for name, tensor in a.average.items():
        assert torch.equal(tensor, b.average[name]), f"average {name}"
    others = dict(b.unet.named_parameters())
    for name, parameter in a.unet.named_parameters():
        mine, theirs = a.optimizer.state[parameter], b.optimizer.state[others[name]]
        assert set(mine) == set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        for kind in mine:
            assert torch.equal(mine[kind], theirs[kind]), f"optimizer {kind} {name}"


def test_round_trip(tmp_path: Path, tiny: Preset) -> None:
    state = moved(new_state(tiny, CPU), 3)
    assert_same(load_state(save_state(tmp_path, state, tiny), tiny, CPU), state)


def test_a_loaded_state_goes_on_as_the_saved_one_would(tmp_path: Path, tiny: Preset) -> None:
    state = moved(new_state(tiny, CPU), 3)
    loaded = load_state(save_state(tmp_path, state, tiny), tiny, CPU)
    assert_same(moved(loaded, 3), moved(state, 3))


def test_a_state_before_the_first_step_is_a_state(tmp_path: Path, tiny: Preset) -> None:
    path = save_state(tmp_path, new_state(tiny, CPU), tiny)
    assert load_state(path, tiny, CPU).step == 0


def test_the_seed_decides_the_first_weights(tiny: Preset) -> None:
    a, b, c = (new_state(replace(tiny, seed=s), CPU) for s in (0, 0, 1))
    assert torch.equal(a.unet.stem.weight, b.unet.stem.weight)
    assert not torch.equal(a.unet.stem.weight, c.unet.stem.weight)


def test_the_average_follows_the_weights(tiny: Preset) -> None:
    """By hand: after one step the decay is warmed up to (1 + 1) / (10 + 1)."""
    state = new_state(tiny, CPU)
    before = state.average["stem.weight"].clone()
    moved(state)
    expected = before + (1 - 2 / 11) * (state.unet.stem.weight.detach() - before)
    torch.testing.assert_close(state.average["stem.weight"], expected)
    state.step = 10**6
    before = state.average["stem.weight"].clone()
    state.update_averages(AVERAGED)
    expected = before + 0.001 * (state.unet.stem.weight.detach() - before)
    torch.testing.assert_close(state.average["stem.weight"], expected)


def test_only_the_newest_are_kept(tmp_path: Path, tiny: Preset) -> None:
    state = new_state(tiny, CPU)
    for _ in range(5):
        save_state(tmp_path, moved(state), tiny)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert KEPT == 2 and names == ["state-00000004.safetensors", "state-00000005.safetensors"]


def two_states(folder: Path, tiny: Preset) -> tuple[RunState, Path, Path]:
    state = moved(new_state(tiny, CPU), 2)
    older = save_state(folder, state, tiny)
    kept = load_state(older, tiny, CPU)
    return kept, older, save_state(folder, moved(state, 2), tiny)


@pytest.mark.parametrize("left", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_newest_state_falls_back_to_the_one_before(tmp_path: Path, tiny: Preset, left: float) -> None:
    kept, _, newest = two_states(tmp_path, tiny)
    newest.write_bytes(newest.read_bytes()[: int(left * newest.stat().st_size)])
    state, skipped = resume(tmp_path, tiny, CPU)
    assert_same(state, kept)
    assert len(skipped) == 1 and str(newest) in skipped[newest]


@pytest.mark.parametrize("place", [0.02, 0.5, 0.95])
def test_a_flipped_byte_in_the_newest_state_is_noticed(tmp_path: Path, tiny: Preset, place: float) -> None:
    kept, _, newest = two_states(tmp_path, tiny)
    content = bytearray(newest.read_bytes())
    content[int(place * len(content))] ^= 0x40
    newest.write_bytes(content)
    state, skipped = resume(tmp_path, tiny, CPU)
    assert skipped and str(newest) in skipped[newest]
    assert_same(state, kept)


def test_the_newest_of_good_states_is_resumed(tmp_path: Path, tiny: Preset) -> None:
    two_states(tmp_path, tiny)
    state, skipped = resume(tmp_path, tiny, CPU)
    assert state.step == 4 and not skipped


def test_states_that_are_replaced_while_they_are_read_give_way_to_the_newer(
    tmp_path: Path, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export reads while the run saves."""
    state = new_state(tiny, CPU)
    save_state(tmp_path, state, tiny)
    reading = state_module.read_state

    def late(path: Path, preset: Preset) -> Any:
        if path.name == "state-00000000.safetensors":
            state.step = 2
            save_state(tmp_path, state, tiny)
            path.unlink()
        return reading(path, preset)

    monkeypatch.setattr(state_module, "read_state", late)
    assert resume(tmp_path, tiny, CPU)[0].step == 2


def test_nothing_to_resume_is_a_new_run(tmp_path: Path, tiny: Preset) -> None:
    state, skipped = resume(tmp_path, tiny, CPU)
    assert state.step == state.examples == 0 and not skipped


def test_saving_after_a_fall_back_keeps_what_was_saved(tmp_path: Path, tiny: Preset) -> None:
    """Damaged states of later steps take no place from the good ones: progress made again is not thrown away."""
    _, _, newest = two_states(tmp_path, tiny)
    newest.write_bytes(b"cut")
    state, skipped = resume(tmp_path, tiny, CPU)
    assert state.step == 2 and list(skipped) == [newest]
    set_aside(skipped)
    assert newest.with_suffix(".damaged").read_bytes() == b"cut"
    for _ in range(2):
        saved = save_state(tmp_path, moved(state), tiny)
        assert saved.is_file()
    again, _ = resume(tmp_path, tiny, CPU)
    assert_same(again, state)
    saved.write_bytes(b"cut")
    assert resume(tmp_path, tiny, CPU)[0].step == 3, "two good ones are kept"


def test_states_of_which_none_can_be_read_are_no_beginning(tmp_path: Path, tiny: Preset) -> None:
    """An error that names them, each time: they stay where they are."""
    _, older, newest = two_states(tmp_path, tiny)
    for path in (older, newest):
        path.write_bytes(b"cut")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none can be read") as caught:
            resume(tmp_path, tiny, CPU)
        assert str(older) in str(caught.value) and str(newest) in str(caught.value)
    assert older.exists() and newest.exists()


@pytest.mark.parametrize("free", [0, 1])
def test_a_state_that_cannot_be_opened_now_is_not_damaged(tmp_path: Path, tiny: Preset, free: int) -> None:
    """Descriptors are used up, once the folder was listed; or all but the one by which it is seen that it opens."""
    _, _, newest = two_states(tmp_path, tiny)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with suppress(OSError):
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(free):
            os.close(used.pop())
        with pytest.raises(OSError, match=str(newest)):
            read_tensors(newest)
    finally:
        for handle in used:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    state, skipped = resume(tmp_path, tiny, CPU)
    assert state.step == 4 and not skipped


def test_another_architecture_is_refused(tmp_path: Path, tiny: Preset) -> None:
    path = save_state(tmp_path, new_state(tiny, CPU), tiny)
    other = replace(tiny, unet=replace(tiny.unet, widths=(16, 40)))
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        load_state(path, other, CPU)
    assert str(path) in str(caught.value)


def test_a_changed_preset_does_not_silently_begin_anew(tmp_path: Path, tiny: Preset) -> None:
    """A run folder of another architecture: an error, not step 0 in the same folder."""
    save_state(tmp_path, moved(new_state(tiny, CPU), 3), tiny)
    other = replace(tiny, unet=replace(tiny.unet, widths=(16, 40)))
    with pytest.raises(CheckpointError, match="architecture"):
        resume(tmp_path, other, CPU)


@pytest.mark.parametrize("header", [{}, {"preset": "{"}, {"preset": "{}", "step": "1", "examples": "8"}])
def test_a_file_that_is_no_state_is_passed_over(tmp_path: Path, tiny: Preset, header: dict[str, str]) -> None:
    from_elsewhere = {"weights/stem.weight": torch.zeros(2)}
    save_file(from_elsewhere, tmp_path / "state-00000009.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="state-00000009"):
        resume(tmp_path, tiny, CPU)
    good = save_state(tmp_path, moved(new_state(tiny, CPU)), tiny)
    state, skipped = resume(tmp_path, tiny, CPU)
    assert good.exists() and state.step == 1 and len(skipped) == 1


def test_a_state_that_lacks_a_part_is_passed_over(tmp_path: Path, tiny: Preset) -> None:
    path = save_state(tmp_path, moved(new_state(tiny, CPU)), tiny)
    with safe_open(path, framework="pt") as file:
        tensors, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    del tensors["average/stem.weight"], header["sha256"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError, match=f"{path} lacks weights or their average"):
        resume(tmp_path, tiny, CPU)


def test_a_state_of_before_ranks_and_optimizers_is_read(tmp_path: Path, tiny: Preset) -> None:
    """Its header has no names that came later, and no sha256."""
    state = moved(new_state(tiny, CPU), 2)
    path = save_state(tmp_path, state, tiny)
    with safe_open(path, framework="pt") as file:
        tensors, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    old = json.loads(header["preset"])
    for name in ("optimizer", "ema", "ema_lengths", "accumulation", "precision", "activation_checkpointing"):
        del old[name]
    old["unet"] = {n: v for n, v in old["unet"].items() if n not in LATER}
    save_file(tensors, path, metadata={"preset": json.dumps(old), "step": "2", "examples": header["examples"]})
    assert_same(load_state(path, tiny, CPU), state)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": "adafactor"}, "optimizer 'adam'"),
        ({"ema": "post-hoc", "ema_decay": 0.0, "ema_lengths": (0.1,)}, "ema"),
    ],
)
def test_a_state_of_another_optimizer_or_average_is_refused(
    changed: dict[str, Any], named: str, tmp_path: Path, tiny: Preset
) -> None:
    path = save_state(tmp_path, moved(new_state(tiny, CPU)), tiny)
    with pytest.raises(CheckpointError, match=named):
        load_state(path, replace(tiny, **changed), CPU)
