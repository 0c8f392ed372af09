"""What a person looks at while a run goes on: a grid of held-out samples, and plots of the losses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from common.conditioning import keep
from common.files import write_atomic
from common.images import contact_sheet, encode_png, enlarge_bicubic, from_unit
from common.trajectories import run_together
from trainer.batches import Batch, rng_of
from trainer.fit import Trainer
from trainer.loss import condition_of

GRID = 8
STEPS = 24
MAX_GRIDS = 100


def look(trainer: Trainer) -> None:
    """Write `samples-<examples>.png`, `samples.png` (the newest) and `losses.png` to the run's folder."""
    pixels = _samples(trainer)
    trainer.picture("samples", pixels)
    sheet = encode_png(pixels)
    write_atomic(trainer.folder / f"samples-{trainer.state.examples:09d}.png", sheet)
    write_atomic(trainer.folder / "samples.png", sheet)
    thin_out(trainer.folder)
    plot_losses(trainer.folder)


def thin_out(folder: Path) -> None:
    """Keep MAX_GRIDS grids of samples, from all over the run: those go that stand closest, by examples."""
    named = ((path.stem.removeprefix("samples-"), path) for path in folder.glob("samples-*.png"))
    grids = sorted((int(examples), path) for examples, path in named if examples.isdecimal())
    while len(grids) > MAX_GRIDS:
        closest = min(range(1, len(grids) - 1), key=lambda i: grids[i + 1][0] - grids[i - 1][0])
        grids.pop(closest)[1].unlink(missing_ok=True)


def _samples(trainer: Trainer) -> np.ndarray:
    side = trainer.preset.side(trainer.state.examples)
    batch = trainer.source.held_out_batch(rng_of(10**9, 0), side).to(trainer.device)
    size = min(GRID, batch.x0.shape[0])
    first = torch.arange(0, batch.x0.shape[0], max(1, trainer.preset.draws))[:size].to(trainer.device)
    with trainer.averaged() as unet, torch.inference_mode():
        # An input noised to the smallest level is as good as clean: previews enlarge what serving would enlarge.
        condition = condition_of(unet, trainer.spec, replace(batch, low_res_t=torch.zeros_like(batch.low_res_t))).take(
            first
        )
        if not unet.config.uses_neighbors:
            return _enlargements(trainer, unet, batch, condition, first, side)
        yes = torch.ones(len(first), dtype=torch.bool, device=trainer.device)
        with_neighbors = _run(trainer, unet, condition, side)
        without = _run(trainer, unet, keep(condition, yes, ~yes), side)
    groups = batch.group[first]
    rows = [
        *(_pictures(batch.neighbors[groups, k]) for k in range(batch.neighbors.shape[1])),
        _pictures(batch.x0[first]),
        _pictures(with_neighbors),
        _pictures(without),
    ]
    names = [*(f"neighbor {k + 1}" for k in range(batch.neighbors.shape[1])), "true", "with neighbors", "without"]
    return contact_sheet(rows, names)


def _enlargements(
    trainer: Trainer, unet: Any, batch: Batch, condition: Any, first: torch.Tensor, side: int
) -> np.ndarray:
    low = _pictures(batch.low_res[first])
    rows = [
        [enlarge_bicubic(p, side) for p in low],
        _pictures(_run(trainer, unet, condition, side)),
        _pictures(batch.x0[first]),
    ]
    return contact_sheet(rows, ["bicubic", "this stage", "true"])


def _run(trainer: Trainer, unet: Any, condition: Any, side: int) -> torch.Tensor:
    plan = replace(trainer.spec.plan(seed=7), stage=side, steps=min(STEPS, trainer.spec.steps))
    return run_together(
        unet, trainer.spec.prediction, [replace(plan, sample=i) for i in range(condition.num_rows)], condition
    )


def _pictures(unit: torch.Tensor) -> list[np.ndarray]:
    return list(from_unit(unit.float().movedim(1, -1).cpu().numpy()))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `log.jsonl`; a last line that was cut by a crash is passed over."""
    lines = []
    path = folder / "log.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def plot_losses(folder: Path) -> None:
    """Write `losses.png`: training loss, and the paired held-out losses under the conditions."""
    lines = read_log(folder)
    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["examples"] for line in train], [line["loss"] for line in train], lw=0.8)
    left.set(title="training loss", xlabel="examples", yscale="log")
    for name in ("full", "text_only", "neighbors_only", "none", "wrong_neighbors"):
        points = [(line["examples"], line[name]) for line in held_out if name in line]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=name.replace("_", " "))
    right.set(title="held-out loss, paired", xlabel="examples")
    if held_out:
        right.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    write_atomic(folder / "losses.png", stream.getvalue())
