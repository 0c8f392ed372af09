"""Beginning a run from weights that are there: published ones, or another run's average."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import MANIFEST, CheckpointError, load_stage
from common.files import sha256_file
from trainer.presets import Preset
from trainer.state import RunState
from trainer.state_file import DamagedStateError, read_tensors


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a run took over, weight by weight.

    Attributes:
        origin, sha256: the file that was read.
        step, examples: from which the run counts on; 0 unless every weight was taken over.
        loaded: taken over.
        new: not there; as the preset's seed has them.
        reshaped: there, but of another shape (theirs, ours); as the preset's seed has them.
        unused: there, but not of this architecture.
    """

    origin: str
    sha256: str
    step: int
    examples: int
    loaded: list[str]
    new: list[str]
    reshaped: dict[str, list[list[int]]]
    unused: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: how many weights of each kind, and the names of those that were not taken over."""
        said = [f"started from {self.origin}: {len(self.loaded)} weights loaded, counting on from step {self.step}"]
        said += [f"  new, not in that file: {name}" for name in self.new]
        said += [f"  new, of another shape there {a}, here {b}: {name}" for name, (a, b) in self.reshaped.items()]
        return said + [f"  not used, of another architecture: {name}" for name in self.unused]


@dataclass(frozen=True, kw_only=True)
class _Origin:
    path: Path
    tensors: Mapping[str, Tensor]
    step: int
    examples: int


def begin_from(state: RunState, preset: Preset, place: Path) -> WarmStart:
    """Put weights into a new run, and into its averages; all ranks together, the first reads.

    Weights are matched by name and shape. Where all are taken over, the run counts on from the step and the examples
    that they had seen; else it counts from 0. The optimizer starts afresh.

    Args:
        place: a folder of published weights, of which the preset's stage is read; a run folder; or a state's file.

    Raises:
        CheckpointError: there are none, they are damaged, none fits, or they have seen all that the preset trains for.
    """
    origin = state.ranks.led(partial(_read, place, preset))
    shapes = {name: list(tensor.shape) for name, tensor in state.unet.state_dict().items()}
    told = _compare(origin, shapes).to_json() if origin is not None else {}
    listing = WarmStart(**json.loads(state.ranks.told(json.dumps(told))))
    if not listing.loaded:
        raise CheckpointError(f"--start-from: no weight of {listing.origin} fits the preset {preset.name!r}")
    if listing.examples >= preset.total_examples:
        raise CheckpointError(
            f"--start-from: {listing.origin} has seen {listing.examples} examples, and the run counts on from there: "
            f"nothing is left of the {preset.total_examples} that {preset.name!r} trains for"
        )
    weights = state.unet.state_dict()
    for name in listing.loaded:
        tensor = origin.tensors[name] if origin is not None else None
        for target in (weights, *state.averages.values()):
            state.ranks.hand_out(target[name], tensor)
    state.step, state.examples = listing.step, listing.examples
    return listing


def _compare(origin: _Origin, shapes: dict[str, list[int]]) -> WarmStart:
    theirs = {name: list(tensor.shape) for name, tensor in origin.tensors.items()}
    loaded = [name for name in shapes if theirs.get(name) == shapes[name]]
    whole = len(loaded) == len(shapes) == len(theirs)
    return WarmStart(
        origin=str(origin.path),
        sha256=sha256_file(origin.path),
        step=origin.step if whole else 0,
        examples=origin.examples if whole else 0,
        loaded=loaded,
        new=[name for name in shapes if name not in theirs],
        reshaped={n: [theirs[n], shapes[n]] for n in shapes if n in theirs and theirs[n] != shapes[n]},
        unused=[name for name in theirs if name not in shapes],
    )


def _read(place: Path, preset: Preset) -> _Origin:
    if (place / MANIFEST).is_file():
        published = load_stage(place, preset.stage)
        tensors = {name: tensor.float() for name, tensor in published.unet.state_dict().items()}
        step, examples = int(published.trained["step"]), int(published.trained["examples"])
        return _Origin(path=place / f"unet_{preset.stage}.safetensors", tensors=tensors, step=step, examples=examples)
    if not place.exists():
        raise CheckpointError(f"--start-from: {place} does not exist")
    states = sorted(place.glob("state-*.safetensors"), reverse=True) if place.is_dir() else [place]
    if not states:
        raise CheckpointError(f"--start-from: {place} holds neither published weights nor a run's state")
    for path in states:
        try:
            return _read_run(path)
        except DamagedStateError:
            if path == states[-1]:
                raise
    raise AssertionError


def _read_run(path: Path) -> _Origin:
    """The average that a run's state publishes."""
    tensors, header = read_tensors(path)
    try:
        trained = json.loads(header["preset"])
        step, examples = int(header["step"]), int(header["examples"])
    except (KeyError, ValueError) as error:
        raise DamagedStateError(f"state: {path} cannot be read ({error!r})") from None
    lengths = trained.get("ema_lengths") or []
    part = f"average-{lengths[0]:g}/" if lengths else "average/"
    found = {name.removeprefix(part): t.to(torch.float32) for name, t in tensors.items() if name.startswith(part)}
    return _Origin(path=path, tensors=found, step=step, examples=examples)
