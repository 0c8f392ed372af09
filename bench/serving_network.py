"""What one stage's network costs: guidance strategies, neighbors, and the share of the machine's convolution rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from common.diffusion.guidance import Guidance, Strategy
from common.diffusion.plan import Plan
from common.stages import StageSpec
from common.trajectories import Trajectory, begin, step_together
from common.unet.condition import Condition, Newcomers
from common.unet.unet import UNet

NUM_NEIGHBORS = 2
NUM_TOKENS = 16
# The work of the first stage in each benchmark, said here so that figures compare from one version to the next, whatever
# the stage's default is.
BASE_STEPS = 12
SHARE_STEPS = (4, BASE_STEPS, 32)
TOGETHER = 8  # trajectories that arrive at once
CONVOLUTIONS = (
    (64, 64, 1),
    (64, 64, 8),
    (128, 64, 1),
    (128, 64, 8),
    (256, 32, 8),
    (512, 16, 8),
)  # channels, side, batch

# What an operator does, for the table of where a step's time goes; the first that fits.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolutions", ("mkldnn_convolution", "cudnn_convolution", "convolution", "thnn_conv")),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention")),
    ("matrix products", ("addmm", "bmm", "::mm", "linear", "matmul")),
    ("normalization", ("layer_norm", "native_layer_norm", "norm", "linalg_vector_norm")),
    ("moving memory", ("copy_", "cat", "clone", "contiguous", "index", "stack", "pixel_", "pad", "expand", "_to_copy")),
)
REST = "element by element, and the rest"


def _packed_flop(
    x: Sequence[int], weight: Sequence[int], *arguments: object, out_shape: Sequence[int], **more: object
) -> int:
    return conv_flop_count(list(x), list(weight), list(out_shape))


_PACKED = {torch.ops.mkldnn._convolution_pointwise: _packed_flop}


def alternate(works: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Seconds of each piece of work, the least of `repeats`, taken in turns: what else the machine does only adds to it."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return {name: min(taken) for name, taken in times.items()}


@torch.inference_mode()
def condition_of(unet: UNet, spec: StageSpec, *, num_neighbors: int = NUM_NEIGHBORS) -> Condition:
    """A condition of random texts and pictures, of the sizes of the demonstration's."""
    return unet.condition(**_inputs(unet, spec, num_neighbors))


@torch.inference_mode()
def trajectory_of(unet: UNet, spec: StageSpec, plan: Plan, *, num_neighbors: int = NUM_NEIGHBORS) -> Trajectory:
    """One trajectory before its first step, in which its neighbors are encoded, as in a served stage."""
    given, newcomers = _inputs(unet, spec, num_neighbors), None
    later = unet.config.uses_neighbors and num_neighbors > 0
    if later:
        newcomers = Newcomers(
            pictures=given["neighbors"], text=given["neighbor_text"], text_mask=given["neighbor_text_mask"]
        )
    return begin(plan, unet.condition(**given, later=later), newcomers=newcomers)


def _inputs(unet: UNet, spec: StageSpec, num_neighbors: int) -> dict[str, Any]:
    source = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source).to(unet.device, unet.dtype)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=torch.bool, device=unet.device)

    width = unet.config.text_width
    tokens = NUM_TOKENS if width else 0
    low_res = random(1, 3, spec.low_res_size, spec.low_res_size).clamp(-1, 1) if spec.low_res_size else None
    return {
        "text": random(1, tokens, width),
        "text_mask": ones(1, tokens),
        "neighbors": random(1, num_neighbors, 3, spec.size, spec.size).clamp(-1, 1),
        "neighbor_text": random(1, num_neighbors, tokens, width),
        "neighbor_text_mask": ones(1, num_neighbors, tokens),
        "neighbor_mask": ones(1, num_neighbors),
        "low_res": low_res,
        "augmentation": torch.zeros(1, device=unet.device) if spec.low_res_size else None,
    }


def run(unet: UNet, spec: StageSpec, trajectories: Sequence[Trajectory]) -> None:
    """Step trajectories of one length to their ends."""
    while not trajectories[0].done:
        step_together(unet, spec.prediction, trajectories)


def guidance_figures(unet: UNet, spec: StageSpec, *, repeats: int) -> dict[str, Any]:
    """A step under each strategy, of one trajectory alone."""
    steps = 8

    def stepping(strategy: Strategy) -> Callable[[], object]:
        guidance = Guidance(strategy=strategy, text_weight=3.0, neighbor_weight=5.0, eta=0.5)
        plan = replace(spec.plan(3), steps=steps, guidance=guidance)
        return lambda: run(unet, spec, [trajectory_of(unet, spec, plan)])

    seconds = alternate({name: stepping(name) for name in ("joint", "interleaved", "weighted")}, repeats=repeats)
    return {
        "interleaved_vs_joint": round(seconds["interleaved"] / seconds["joint"], 4),
        "weighted_vs_joint": round(seconds["weighted"] / seconds["joint"], 4),
        "joint_step_ms": round(seconds["joint"] / steps * 1e3, 2),
    }


def neighbor_figures(unet: UNet, spec: StageSpec, *, repeats: int) -> dict[str, Any]:
    """What neighbors cost one trajectory: encoding them once, beside its first step, and reading them at each.

    Encoding is the difference of two first steps, of one that brings its neighbors and of one whose neighbors have been
    encoded. The less a trajectory steps, the larger the share of what is done once: `neighbor_share` is of `BASE_STEPS`.
    A lone row leaves much of the machine idle, which is why neighbors beside it cost little; `neighbor_share_together` is of
    `TOGETHER` trajectories that arrive at once.
    """
    known, base = condition_of(unet, spec), replace(spec.plan(3), steps=BASE_STEPS)

    def arriving(rows: int) -> list[Trajectory]:
        return [trajectory_of(unet, spec, replace(base, sample=i)) for i in range(rows)]

    def encoded(rows: int) -> list[Trajectory]:
        for _ in range(rows):
            condition_of(unet, spec, num_neighbors=0)
        return [begin(replace(base, sample=i), known) for i in range(rows)]

    works: dict[str, Callable[[], object]] = {
        f"{made.__name__} {rows}": lambda made=made, rows=rows: step_together(unet, spec.prediction, made(rows))
        for rows in (1, TOGETHER)
        for made in (arriving, encoded)
    }
    works["together"] = lambda: run(unet, spec, arriving(TOGETHER))
    for steps in SHARE_STEPS:
        plan = replace(spec.plan(3), steps=steps)
        works[f"whole {steps}"] = lambda plan=plan: run(unet, spec, [trajectory_of(unet, spec, plan)])
        works[f"without {steps}"] = lambda plan=plan: run(
            unet, spec, [trajectory_of(unet, spec, plan, num_neighbors=0)]
        )
    seconds = alternate(works, repeats=repeats)
    encoding_s, whole_s = seconds["arriving 1"] - seconds["encoded 1"], seconds[f"whole {BASE_STEPS}"]
    together_s = seconds[f"arriving {TOGETHER}"] - seconds[f"encoded {TOGETHER}"]
    return {
        "neighbor_share": round(encoding_s / whole_s, 4),
        "neighbor_share_of_steps": {str(n): round(encoding_s / seconds[f"whole {n}"], 4) for n in SHARE_STEPS},
        "neighbor_share_together": round(together_s / seconds["together"], 4),
        "neighbor_encoding_ms": round(encoding_s * 1e3, 2),
        "neighbor_reading_share": round((whole_s - seconds[f"without {BASE_STEPS}"] - encoding_s) / whole_s, 4),
        "trajectory_ms": round(whole_s * 1e3, 1),
        "steps": BASE_STEPS,
    }


@torch.inference_mode()
def machine_convolution_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some plain 3 x 3 convolutions: what this machine can do."""
    rates = []
    for channels, side, batch in CONVOLUTIONS:
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
        conv = conv.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            _synchronized(lambda conv=conv, x=x: conv(x), device)
            seconds.append(time.perf_counter() - started)
        rates.append(2 * 9 * channels * channels * side * side * batch / min(seconds))
    return max(rates)


def _synchronized(work: Callable[[], object], device: str) -> None:
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def convolution_figures(unet: UNet, spec: StageSpec, peak: float, *, rows: int, repeats: int) -> dict[str, Any]:
    """Of a step of `rows` trajectories: the share of the convolution rate `peak` (FLOP/s), and where its time goes."""
    plan = replace(spec.plan(3), steps=1000)
    trajectories = [trajectory_of(unet, spec, replace(plan, sample=i)) for i in range(rows)]

    def step() -> None:
        step_together(unet, spec.prediction, trajectories)

    step()  # which encodes the neighbors
    with FlopCounterMode(display=False, custom_mapping=_PACKED) as counter:
        step()
    flop = counter.get_total_flops()
    seconds = alternate({"step": step}, repeats=repeats)["step"]
    return {
        "convolution_rate_share": round(flop / seconds / peak, 4),
        "step_ms": round(seconds * 1e3, 2),
        "step_gflop": round(flop / 1e9, 3),
        "gflop_per_s": round(flop / seconds / 1e9, 1),
        "rows": rows,
        "where_time_goes": shares_of_time(step),
    }


def shares_of_time(
    step: Callable[[], object], kinds: Sequence[tuple[str, tuple[str, ...]]] = KINDS, *, repeats: int = 3
) -> dict[str, float]:
    """Share of a step's time by what its operators do."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(repeats):
            step()
    taken = {kind: 0.0 for kind, _ in kinds} | {REST: 0.0}
    for event in profiled.key_averages():
        name = event.key
        kind = next((kind for kind, parts in kinds if any(part in name for part in parts)), REST)
        taken[kind] += event.self_cpu_time_total
    total = sum(taken.values())
    return {kind: round(seconds / total, 3) for kind, seconds in sorted(taken.items(), key=lambda item: -item[1])}
