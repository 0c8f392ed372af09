"""Averages stored along a run, from which one of any length is put together after it (see `trainer.ema`)."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import CheckpointError
from trainer.ema import combination
from trainer.presets import Preset
from trainer.state import RunState, average_names
from trainer.state_file import read_tensors, write_tensors

SNAPSHOTS = 32  # of each length over a run
SUM_TOLERANCE = 0.01  # by which the shares of stored averages may miss 1: the weights are scaled by their sum


def snapshot_every(preset: Preset) -> int:
    """Steps from one snapshot to the next."""
    return max(1, preset.total_examples // preset.batch // SNAPSHOTS)


def save_snapshot(folder: Path, state: RunState, preset: Preset) -> None:
    """Write the averages of a post-hoc run as `averages/<step>-<length>.safetensors` in fp16; all ranks together."""
    for name, length in average_names(preset).items():
        if length is None:
            continue
        whole = {k: state.ranks.full(t) for k, t in state.averages[name].items()}
        halves = {k: t.detach().cpu().half().contiguous() for k, t in whole.items()} if state.ranks.leads else {}
        path = folder / "averages" / f"{state.step:08d}-{length:g}.safetensors"
        state.ranks.led(partial(write_tensors, path, halves, {"step": str(state.step), "length": f"{length:g}"}))


def average_of_length(folder: Path, length: float) -> tuple[int, dict[str, Tensor]]:
    """The average of a relative length at the newest snapshot, put together from all of them; and its step.

    Raises:
        CheckpointError: the run has stored too few averages to make this one, or one is damaged.
        ValueError: no average is that short or long.
    """
    stored: dict[tuple[int, float], Path] = {}
    for path in sorted((folder / "averages").glob("*.safetensors")):
        told = re.fullmatch(r"(\d+)-([\d.]+)\.safetensors", path.name)
        if told:
            stored[int(told[1]), float(told[2])] = path
    if len(stored) < 2:
        raise CheckpointError(f"averages: {folder} has stored {len(stored)} averages, two are needed")
    step = max(t for t, _ in stored)
    shares = combination(list(stored), step, length)
    if abs(shares.sum() - 1.0) > SUM_TOLERANCE:
        raise CheckpointError(
            f"averages: those that {folder} has stored make none of length {length:g}, their shares sum to "
            f"{shares.sum():.3f}: it reaches back before the first of them (step {min(t for t, _ in stored)}; "
            f"a run that counts on from other weights has none of before), or they are too few"
        )
    total: dict[str, Tensor] = {}
    for weight, path in zip(shares, stored.values(), strict=True):
        tensors, _ = read_tensors(path)
        for name, tensor in tensors.items():
            total[name] = total.get(name, torch.zeros_like(tensor, dtype=torch.float32)).add_(
                tensor.float(), alpha=float(weight)
            )
    return step, total
