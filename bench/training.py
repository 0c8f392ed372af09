"""`make bench-training`: steps of training (forward, backward, optimizer) beside imagen-pytorch and an IF-type U-Net.

The claims are ratios of medians, within one run whose rounds take the models in turns: one batch, one side, one width of
text, no neighbors, parameters and FLOP alike (both are written beside the rates). Each peer runs in whichever memory layout
is faster for it. demo-64 itself is measured with its neighbors and without. Writes `results/training.json` and a table.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.serving_network import KINDS, machine_convolution_rate, shares_of_time
from bench.training_peers import DiffusersIF, ImagenPytorch
from bench.training_work import Work, random_batch
from common.files import write_atomic, write_json
from common.stages import STAGES
from common.unet.config import UNetConfig
from common.unet.unet import UNet
from trainer.loss import training_loss
from trainer.optimizers import optimizer_of
from trainer.presets import Preset, preset

MATCHED = UNetConfig(
    patch=2,
    widths=(160, 192, 256),
    blocks=(1, 1, 2),
    attention=(False, False, True),
    text_attention=(False, False, True),
    neighbor_attention=(False, True, True),
    head_width=32,
    text_width=384,
    embedding_width=320,
    scale=1,
    skip_scale=1.0,
    positions=True,
    placement=False,
)
TINY = replace(MATCHED, widths=(16, 32, 64), blocks=(1, 1, 1), embedding_width=32)  # tests
PEERS: dict[str, Callable[[], nn.Module]] = {
    "imagen_pytorch": lambda: ImagenPytorch(TEXT_WIDTH, TOKENS),
    "diffusers_if": lambda: DiffusersIF(TEXT_WIDTH, SIDE, widths=(24, 32, 96, 256), attends=3),
    "diffusers_if_attending_once": lambda: DiffusersIF(TEXT_WIDTH, SIDE, widths=(32, 48, 88, 256), attends=1),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIDE, TOKENS, TEXT_WIDTH = 64, 16, 384
LIMITS = {"vs_imagen_pytorch": 1.5, "vs_diffusers_if": 1.5}
HEADLINES = (
    *LIMITS,
    "vs_diffusers_if_attending_once",
    "neighbor_cost",
    "neighbor_cost_unshared",
    "convolution_rate_share",
)
_KINDS = (("optimizer", ("adam", "Optimizer", "zero_grad")), *KINDS)


def main() -> int:
    """Measure everything, in one run."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profiled", type=int, default=3, help="steps of which it is told where their time goes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--preset", default="demo-64", help="what is measured with neighbors (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small U-Net of ours and no peers: a test")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    works = ours(preset(flags.preset), flags.batch) | alike(flags.batch, tiny=flags.tiny)
    peaks = [machine_convolution_rate("cpu", torch.float32)]
    seconds = in_turns({name: work.step for name, work in works.items()}, flags.rounds)
    peaks.append(machine_convolution_rate("cpu", torch.float32))
    figures = summary(works, seconds, max(peaks)) | {"machine": _machine(flags.threads), "batch": flags.batch}
    figures["where_time_goes"] = {
        name: shares_of_time(works[name].step, _KINDS, repeats=flags.profiled) for name in ("matched", "without")
    }
    write_json(flags.out, figures)
    write_atomic(flags.out.with_suffix(".md"), table(figures))
    print(table(figures))
    return 0


def alike(batch: int, *, tiny: bool) -> dict[str, Work]:
    """Our U-Net of the peers' size, and the peers in each layout; all predict the noise from x_t, time and text."""
    works = {"matched": _work(_Ours(UNet(TINY if tiny else MATCHED)), batch, "channels_last")}
    if not tiny:
        for name, peer in PEERS.items():
            works |= {f"{name}, {layout}": _work(peer(), batch, layout) for layout in LAYOUTS}
    return works


def ours(row: Preset, batch: int) -> dict[str, Work]:
    """The preset's own steps: with neighbors shared as it shares them, with a set for each example, and without any."""
    groups = max(1, batch // row.draws)
    return {
        "with_neighbors": _of_preset(row, groups),
        "own_neighbors": _of_preset(replace(row, draws=1), groups * row.draws),
        "without": _of_preset(replace(row, neighbors=0), groups),
    }


def _of_preset(row: Preset, groups: int) -> Work:
    batch = random_batch(row, groups, SIDE, TOKENS)
    unet = UNet(row.unet).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Work(
        model=unet,
        forward=lambda: training_loss(unet, STAGES[0], batch),
        optimizer=optimizer_of(unet, row),
        examples=groups * row.draws,
    )


class _Ours(nn.Module):
    """Our U-Net with the peers' arguments, without neighbors."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        size = x_t.shape[0]
        condition = self.unet.condition(
            text=text,
            text_mask=mask,
            neighbors=x_t.new_zeros(size, 0, *x_t.shape[1:]),
            neighbor_text=text.new_zeros(size, 0, *text.shape[1:]),
            neighbor_text_mask=mask.new_zeros(size, 0, mask.shape[1]),
            neighbor_mask=mask.new_zeros(size, 0),
        )
        return self.unet(x_t, 8 * t - 4, condition)


def _work(model: nn.Module, batch: int, layout: str) -> Work:
    model = model.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]
    x_t, eps = (torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    t, text = torch.rand(batch), torch.randn(batch, TOKENS, TEXT_WIDTH)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    return Work(
        model=model,
        forward=lambda: (model(x_t, t, text, mask) - eps).square().mean(),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-4, fused=True),
        examples=batch,
    )


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def summary(works: dict[str, Work], seconds: dict[str, list[float]], peak: float) -> dict[str, Any]:
    """The headlines, and each model's rate, size and work; `peak` is the machine's convolution rate in FLOP/s."""
    models: dict[str, Any] = {}
    for name, work in works.items():
        figures, median = work.figures(), statistics.median(seconds[name])
        rate = figures["gflop_a_step"] * work.examples / median
        models[name] = figures | {
            "examples_per_s": round(work.examples / median, 3),
            "step_ms": round(1e3 * median, 1),
            "step_ms_least_and_most": [round(1e3 * s, 1) for s in (min(seconds[name]), max(seconds[name]))],
            "convolution_rate_share": round(rate * 1e9 / peak, 4),
        }
    found: dict[str, Any] = {}
    for peer in PEERS:
        rates = [models[name]["examples_per_s"] for name in models if name.startswith(f"{peer},")]
        if rates:
            found[f"vs_{peer}"] = round(models["matched"]["examples_per_s"] / max(rates), 3)
    per_example = {name: 1 / models[name]["examples_per_s"] for name in ("with_neighbors", "own_neighbors", "without")}
    return found | {
        "neighbor_cost": round(per_example["with_neighbors"] / per_example["without"], 3),
        "neighbor_cost_unshared": round(per_example["own_neighbors"] / per_example["without"], 3),
        "convolution_rate_share": models["with_neighbors"]["convolution_rate_share"],
        "machine_convolution_gflop_per_s": round(peak / 1e9, 1),
        "models": models,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = ["| figure | measured | wanted |", "|---|---|---|"]
    for name in HEADLINES:
        lines.append(f"| {name} | {figures.get(name, '-')} | {f'at least {LIMITS[name]}' if name in LIMITS else ''} |")
    columns = ("examples_per_s", "parameters_m", "gflop_a_pass", "gflop_a_step", "step_ms", "convolution_rate_share")
    lines += ["", "| model | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in figures["models"].items():
        lines.append(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    lines += ["", "| where a step's time goes | " + " | ".join(figures["where_time_goes"]) + " |"]
    lines.append("|---|" + "---|" * len(figures["where_time_goes"]))
    for kind in next(iter(figures["where_time_goes"].values())):
        lines.append(f"| {kind} | " + " | ".join(str(of[kind]) for of in figures["where_time_goes"].values()) + " |")
    return "\n".join(lines) + "\n"


def _machine(threads: int) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
