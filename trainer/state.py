"""A run's state: weights, their averages, the optimizer, the position. Saved so that a resumed run is the same run.

On disk a state is one safetensors file of whole tensors, whatever the number of ranks that wrote it: any number reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CheckpointError
from common.stages import stage
from common.unet.config import UNetConfig
from common.unet.unet import UNet
from trainer.distributed import ALONE, Ranks, own, remember_less
from trainer.ema import classic_share, power_share
from trainer.optimizers import begin, optimizer_of
from trainer.presets import Preset
from trainer.state_file import DamagedStateError, read_tensors, write_tensors

STATES = "state-*.safetensors"
KEPT = 2  # states of a run kept on disk: a damaged last one falls back to the one before


@dataclass(kw_only=True)
class RunState:
    """Everything that a step changes.

    Attributes:
        unet: its weights, or this rank's slices of them.
        objective: the training loss over `unet`, as its ranks compute it.
        averages: averages of the weights by name (see `average_names`), each by the weight's name.
        optimizer: of the weights.
        step, examples: taken so far.
        ranks: over which all of this is laid.
    """

    unet: UNet
    objective: nn.Module
    averages: dict[str, dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    step: int
    examples: int
    ranks: Ranks = ALONE

    @property
    def average(self) -> dict[str, Tensor]:
        """The average that is shown and published."""
        return next(iter(self.averages.values()))

    @torch.no_grad()
    def update_averages(self, preset: Preset) -> None:
        """Move the averages towards the weights of this step."""
        weights = self.unet.state_dict()
        for name, average in self.averages.items():
            share = _share(name, preset, self.step)
            for weight, tensor in average.items():
                own(tensor).lerp_(own(weights[weight]), share)


def average_names(preset: Preset) -> dict[str, float | None]:
    """Name of each average that a run keeps, as states and snapshots call it, and its relative length."""
    if preset.ema == "classic":
        return {"average": None}
    return {f"average-{length:g}": length for length in preset.ema_lengths}


def _share(name: str, preset: Preset, step: int) -> float:
    length = average_names(preset)[name]
    return classic_share(step, preset.ema_decay) if length is None else power_share(step, length)


def uses_bfloat16(preset: Preset, device: torch.device) -> bool:
    """Whether passes run in bfloat16 under autocast."""
    return preset.precision == "bfloat16" or (preset.precision == "auto" and device.type == "cuda")


def new_state(preset: Preset, device: torch.device, ranks: Ranks = ALONE) -> RunState:
    """A run at its beginning; the initial weights come from the preset's seed, the same on all ranks."""
    torch.manual_seed(preset.seed)
    unet = UNet(preset.unet)
    if ranks.parallel != "fsdp2":  # which slices weights on the host, and only as they lie by default
        unet = unet.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if preset.activation_checkpointing:
        remember_less(unet)
    objective = ranks.lay(unet, stage(preset.stage), device, bfloat16=uses_bfloat16(preset, device))
    averages = {n: {k: t.detach().clone() for k, t in unet.state_dict().items()} for n in average_names(preset)}
    optimizer = optimizer_of(unet, preset)
    return RunState(
        unet=unet, objective=objective, averages=averages, optimizer=optimizer, step=0, examples=0, ranks=ranks
    )


def state_path(folder: Path, step: int) -> Path:
    """Where a run's state after so many steps is kept."""
    return folder / f"state-{step:08d}.safetensors"


def save_state(folder: Path, state: RunState, preset: Preset) -> Path:
    """Write the state atomically, then drop all but the newest KEPT; all ranks together, the first writes.

    Raises:
        OSError: the disk is full; the states that were there are as they were.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _parts(state).items():
        whole = state.ranks.full(tensor)
        if state.ranks.leads:
            tensors[name] = whole.detach().cpu().contiguous()
    header = {"step": str(state.step), "examples": str(state.examples), "preset": json.dumps(preset.to_json())}
    path = state_path(folder, state.step)
    state.ranks.led(partial(_write, path, tensors, header))
    return path


def _parts(state: RunState) -> dict[str, Tensor]:
    """All tensors of a state, by the names that they have on disk."""
    tensors = {f"weights/{name}": tensor for name, tensor in state.unet.state_dict().items()}
    for average, found in state.averages.items():
        tensors |= {f"{average}/{name}": tensor for name, tensor in found.items()}
    for name, parameter in state.unet.named_parameters():
        kinds = state.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{kind}/{name}": tensor for kind, tensor in kinds.items()}
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    write_tensors(path, tensors, header)
    states = sorted(path.parent.glob(STATES))
    for old in states[: max(0, states.index(path) + 1 - KEPT)]:
        old.unlink()


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What a state's file holds; on ranks other than the first without its tensors."""

    path: Path
    step: int
    examples: int
    names: list[str]
    tensors: dict[str, Tensor]


def read_state(path: Path, preset: Preset) -> SavedState:
    """Read a file that `save_state` wrote.

    Raises:
        DamagedStateError: the file is damaged.
        CheckpointError: it is of another architecture, optimizer or average.
    """
    tensors, header = read_tensors(path)
    try:
        saved: dict[str, Any] = json.loads(header["preset"])
        architecture, step, examples = saved["unet"], int(header["step"]), int(header["examples"])
    except (KeyError, ValueError) as error:
        raise DamagedStateError(f"state: {path} cannot be read ({error!r})") from None
    _check_kind(path, preset, saved, architecture)
    weights, averages = _named(tensors, "weights"), list(average_names(preset))
    if not weights or any(_named(tensors, average) != weights for average in averages):
        raise DamagedStateError(f"state: {path} lacks weights or their average")
    return SavedState(path=path, step=step, examples=examples, names=sorted(tensors), tensors=tensors)


def _check_kind(path: Path, preset: Preset, saved: dict[str, Any], architecture: dict[str, Any]) -> None:
    try:
        same = UNetConfig.from_json(architecture) == preset.unet
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(f"state: {path} was trained with another architecture than preset {preset.name!r}")
    for field, before in (("optimizer", "adam"), ("ema", "classic"), ("ema_lengths", [])):
        mine = json.loads(json.dumps(getattr(preset, field)))
        if saved.get(field, before) != mine:
            raise CheckpointError(
                f"state: {path} was trained with {field} {saved.get(field, before)!r}, preset {preset.name!r} says {mine!r}"
            )


def _named(tensors: dict[str, Tensor], part: str) -> set[str]:
    return {name.removeprefix(f"{part}/") for name in tensors if name.startswith(f"{part}/")}


def load_state(path: Path, preset: Preset, device: torch.device, ranks: Ranks = ALONE) -> RunState:
    """A run as the file at `path` has it; all ranks together, the first reads.

    Raises:
        DamagedStateError: the file is damaged.
        CheckpointError: it is of another architecture, optimizer or average.
    """
    return _state_of(ranks.led(partial(read_state, path, preset)), preset, device, ranks)


def _state_of(saved: SavedState | None, preset: Preset, device: torch.device, ranks: Ranks) -> RunState:
    """Hand out what the first rank has read."""
    contents = json.loads(ranks.told(json.dumps(_contents(saved))))
    state = new_state(preset, device, ranks)
    state.step, state.examples = contents["step"], contents["examples"]
    with_state = {name.split("/", 2)[2] for name in contents["names"] if name.startswith("optimizer/")}
    for name, parameter in state.unet.named_parameters():
        if name in with_state:
            state.optimizer.state[parameter] = begin(state.optimizer, parameter)
    targets = _parts(state)
    if set(targets) != set(contents["names"]):
        strange = sorted(set(targets) ^ set(contents["names"]))[:3]
        raise CheckpointError(f"state: {contents['path']} lacks or adds tensors: {strange}")
    for name in contents["names"]:
        ranks.hand_out(targets[name], saved.tensors[name] if saved is not None else None)
    return state


def _contents(saved: SavedState | None) -> dict[str, Any]:
    if saved is None:
        return {}
    return {"path": str(saved.path), "step": saved.step, "examples": saved.examples, "names": saved.names}


def resume(
    folder: Path, preset: Preset, device: torch.device, ranks: Ranks = ALONE
) -> tuple[RunState, dict[Path, str]]:
    """The newest readable state of a run folder, or a new one where there is none; and why newer ones were passed over.

    All ranks together: the first decides which it is. Nothing in the folder is changed (see `set_aside`).

    Raises:
        CheckpointError: there are states, and all are damaged; or the newest is of another architecture.
        OSError: a state cannot be opened now.
    """
    skipped: dict[Path, str] = {}
    saved = ranks.led(partial(_newest, folder, preset, skipped))
    found = ranks.told("found" if saved is not None else "")
    state = _state_of(saved, preset, device, ranks) if found else new_state(preset, device, ranks)
    return state, skipped


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged states, out of the way of those that are saved from now on; for who holds the run's folder."""
    for path in damaged:
        if path.exists():
            path.rename(path.with_suffix(".damaged"))


def check_newest(folder: Path, step: int) -> None:
    """For who holds the run's folder and has opened it at `step` before.

    Raises:
        RuntimeError: another process has held it since, and saved a later state; no bad input: begun again, it goes on.
    """
    newest = max((int(path.stem.removeprefix("state-")) for path in folder.glob(STATES)), default=step)
    if newest > step:
        raise RuntimeError(f"run: {folder} was opened at step {step}; another process has saved step {newest} since")


def _newest(folder: Path, preset: Preset, skipped: dict[Path, str]) -> SavedState | None:
    for path in sorted(folder.glob(STATES), reverse=True):
        try:
            return read_state(path, preset)
        except DamagedStateError as error:
            skipped[path] = str(error)
        except FileNotFoundError:  # whoever trains here has saved newer ones since they were listed
            if path.is_symlink():
                raise
            return _newest(folder, preset, skipped)
    if skipped:
        raise CheckpointError(
            f"run: {folder} holds states and none can be read; move them away to begin anew: {'; '.join(skipped.values())}"
        )
    return None
