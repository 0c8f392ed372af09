"""The dual encoder's training loop: resumable, a run is the same whether or not it was stopped on its way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.checkpoint import CheckpointError
from common.dual_encoder import DualEncoder, publish_dual_encoder
from common.files import write_atomic
from trainer.batches import rng_of
from trainer.clip_features import Features
from trainer.dual_encoder import DualEncoderPreset, begin, draw_batch, dual_encoder_loss

STATE = "state.safetensors"


@dataclass(kw_only=True)
class DualEncoderRun:
    """One run in one folder."""

    preset: DualEncoderPreset
    features: Features
    folder: Path
    model: DualEncoder
    optimizer: torch.optim.AdamW
    text_start: dict[str, Tensor]
    step: int = 0

    def learn(self) -> float:
        """One step; gives its loss."""
        preset = self.preset
        rate = preset.learning_rate * min(1.0, (self.step + 1) / preset.warmup_steps)
        rate *= 0.5 * (1.0 + math.cos(math.pi * self.step / preset.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = rng_of(preset.seed, self.step)
        loss = dual_encoder_loss(self.model, draw_batch(self.features, preset, rng), preset, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():  # decay of the text projection: back to where it began, not to zero
            for name, tensor in self.model.text_projection.named_parameters():
                tensor.lerp_(self.text_start[name], rate * preset.weight_decay)
        self.step += 1
        return float(loss.detach())

    def run(self, show: Callable[[int, float], bool], save_every: int = 500) -> None:
        """Train to the preset's end, or until `show(steps done, loss)` gives False; the state is saved in either case."""
        going = True
        while going and self.step < self.preset.steps:
            loss = self.learn()
            going = show(self.step, loss)
            if self.step % save_every == 0:
                self.save()
        self.save()

    def save(self) -> Path:
        """Write the state atomically: the projections, the optimizer, the step. The tower does not change."""
        tensors = {f"weights/{name}": t for name, t in self.model.state_dict().items() if not name.startswith("tower.")}
        tensors |= {f"start/{name}": t for name, t in self.text_start.items()}
        for name, parameter in _learnt(self.model):
            for kind, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{kind}/{name}"] = tensor
        header = {"step": str(self.step), "preset": json.dumps(self.preset.to_json())}
        path = self.folder / STATE
        write_atomic(path, save({name: t.detach().contiguous() for name, t in tensors.items()}, metadata=header))
        return path

    def publish(self, weights: Path, trained: dict[str, Any]) -> Path:
        """Write what a service loads into the folder `weights`."""
        described = {"preset": self.preset.to_json(), "step": self.step, "pairs": len(self.features.pairs)}
        return publish_dual_encoder(weights, self.model, described | trained)


def open_dual_encoder_run(
    preset: DualEncoderPreset, features: Features, folder: Path, model: DualEncoder
) -> DualEncoderRun:
    """Begin a run with this model's tower, or resume what `folder` holds.

    Raises:
        CheckpointError: the state there is damaged, or of another preset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _initialize(model, preset.seed)
    begin(model, features)
    model.tower.requires_grad_(False)
    image = [p for name, p in _learnt(model) if name.startswith("image")]
    text = [p for name, p in _learnt(model) if not name.startswith("image")]
    groups = [{"params": image, "weight_decay": preset.weight_decay}, {"params": text, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=preset.learning_rate, betas=(0.9, 0.98))
    start = {name: t.detach().clone() for name, t in model.text_projection.named_parameters()}
    run = DualEncoderRun(
        preset=preset, features=features, folder=folder, model=model, optimizer=optimizer, text_start=start
    )
    if (folder / STATE).is_file():
        _resume(run, folder / STATE)
    return run


def _initialize(model: DualEncoder, seed: int) -> None:
    """Projections from the seed: the same whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.image_in, model.image_out):
        bound = layer.in_features**-0.5
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)


def _learnt(model: DualEncoder) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("tower.")]


def _resume(run: DualEncoderRun, path: Path) -> None:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        preset, step = json.loads(header["preset"]), int(header["step"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"state: {path} cannot be read ({error!r})") from None
    if preset != json.loads(json.dumps(run.preset.to_json())):
        raise CheckpointError(f"state: {path} is of another preset than {run.preset.name!r}; name another --run")
    tower = {f"tower.{name}": t for name, t in run.model.tower.state_dict().items()}
    try:
        run.model.load_state_dict(tower | _part(tensors, "weights/"), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"state: {path} is damaged ({error})") from None
    run.text_start, run.step = _part(tensors, "start/"), step
    for name, parameter in _learnt(run.model):
        moments = {
            key.split("/")[1]: t
            for key, t in tensors.items()
            if key.startswith("optimizer/") and key.split("/", 2)[2] == name
        }
        if moments:
            run.optimizer.state[parameter] = moments


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
