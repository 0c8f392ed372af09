"""A run's state: weights, their average, the optimizer, the position. Saved so that a resumed run is the same run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.checkpoint import CheckpointError, StageWeights
from common.files import write_atomic
from common.unet.unet import UNet
from trainer.presets import Preset

KEPT = 2  # states of a run kept on disk: a damaged last one falls back to the one before


class DamagedStateError(CheckpointError):
    """A state was cut, altered, or is none; the one before it may be whole."""


@dataclass(kw_only=True)
class RunState:
    """Everything that a step changes."""

    unet: UNet
    average: dict[str, Tensor]
    optimizer: torch.optim.Adam
    step: int
    examples: int

    def update_average(self, decay: float) -> None:
        """Move the averaged weights towards the weights; early steps count more (decay warms up)."""
        share = 1.0 - min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            weights = self.unet.state_dict()
            for name, average in self.average.items():
                average.lerp_(weights[name], share)


def new_state(preset: Preset, device: torch.device) -> RunState:
    """A run at its beginning; the initial weights come from the preset's seed."""
    torch.manual_seed(preset.seed)
    unet = UNet(preset.unet).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    return RunState(unet=unet, average=average, optimizer=_optimizer(unet, preset), step=0, examples=0)


def _optimizer(unet: UNet, preset: Preset) -> torch.optim.Adam:
    return torch.optim.Adam(unet.parameters(), lr=preset.learning_rate, betas=(0.9, 0.99), fused=True)


def save_state(folder: Path, state: RunState, preset: Preset) -> Path:
    """Write the state atomically, then drop all but the newest KEPT."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.unet.state_dict().items():
        tensors[f"weights/{name}"] = tensor.contiguous()
    for name, tensor in state.average.items():
        tensors[f"average/{name}"] = tensor.contiguous()
    for name, parameter in state.unet.named_parameters():
        for kind, tensor in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{kind}/{name}"] = tensor.contiguous()
    on_host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    header = {"step": str(state.step), "examples": str(state.examples), "preset": json.dumps(preset.to_json())}
    header["sha256"] = _digest(on_host)
    path = folder / f"state-{state.step:08d}.safetensors"
    write_atomic(path, save(on_host, metadata=header))
    states = sorted(folder.glob("state-*.safetensors"))
    for old in states[: max(0, states.index(path) + 1 - KEPT)]:
        old.unlink()
    return path


def load_state(path: Path, preset: Preset, device: torch.device) -> RunState:
    """Read a state that `save_state` wrote.

    Raises:
        DamagedStateError: the file is damaged.
        CheckpointError: it is of another architecture.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved: dict[str, Any] = json.loads(header["preset"])
        architecture, step, examples = saved["unet"], int(header["step"]), int(header["examples"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedStateError(f"state: {path} cannot be read ({error!r})") from None
    if "sha256" in header and header["sha256"] != _digest(tensors):  # states of before it was written have none
        raise DamagedStateError(f"state: {path} is altered")
    if architecture != json.loads(json.dumps(preset.unet.to_json())):
        raise CheckpointError(f"state: {path} was trained with another architecture than preset {preset.name!r}")
    state = new_state(preset, device)
    weights, average = _part(tensors, "weights/"), _part(tensors, "average/")
    if not set(weights) == set(average) == set(state.average):
        raise DamagedStateError(f"state: {path} lacks weights or their average")
    state.unet.load_state_dict(weights, strict=True)
    for name, tensor in average.items():
        state.average[name].copy_(tensor)
    for name, parameter in state.unet.named_parameters():
        kinds = {
            k.split("/")[1]: t for k, t in tensors.items() if k.startswith("optimizer/") and k.split("/", 2)[2] == name
        }
        if kinds:
            # Adam keeps its step count on the host. Its fused step walks memory in the parameter's own order
            # (channels last), so the moments must lie in memory as the parameter does.
            state.optimizer.state[parameter] = {
                k: t if k == "step" else torch.empty_like(parameter, requires_grad=False).copy_(t)
                for k, t in kinds.items()
            }
    state.step, state.examples = step, examples
    return state


def begin_from_weights(state: RunState, published: StageWeights) -> None:
    """Put published weights into a new run, which then counts on from the step and the examples that they had seen.

    The optimizer starts afresh: its moments are not published.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    if published.unet.config != state.unet.config:
        raise CheckpointError("weights: the published stage has another architecture than the preset")
    weights = {name: tensor.float() for name, tensor in published.unet.state_dict().items()}
    state.unet.load_state_dict(weights, strict=True)
    state.average = {name: tensor.clone() for name, tensor in state.unet.state_dict().items()}
    state.step, state.examples = int(published.trained["step"]), int(published.trained["examples"])


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def resume(folder: Path, preset: Preset, device: torch.device) -> tuple[RunState, list[str]]:
    """The newest readable state of a run folder, or a new one; and a line for each state that could not be read."""
    skipped = []
    for path in sorted(folder.glob("state-*.safetensors"), reverse=True):
        try:
            return load_state(path, preset, device), skipped
        except DamagedStateError as error:
            path.rename(path.with_suffix(".damaged"))  # out of the way of the states that are saved from now on
            skipped.append(str(error))
    return new_state(preset, device), skipped
