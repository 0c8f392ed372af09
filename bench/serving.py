"""`make bench-serving`: the generation service against the bare loop, one at a time, and one RPC a step.

Everything is measured in one run on one machine; the claims are the ratios. Writes `results/serving.json` and a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import torch
from prometheus_client import CollectorRegistry

from bench.serving_network import (
    BASE_STEPS,
    TOGETHER,
    convolution_figures,
    guidance_figures,
    machine_convolution_rate,
    neighbor_figures,
)
from bench.serving_overload import overloaded
from bench.serving_service import PROMPT, Served, generator, overhead
from bench.serving_stage import (
    CALLERS,
    BatchCount,
    StageOrder,
    drawn_by,
    make_orders,
    make_stage_inputs,
    seconds_for,
    throughput,
    triton_batches,
)
from bench.serving_steps import StepClient
from common.checkpoint import load_stage
from common.files import write_atomic, write_json
from common.images import encode_png, from_unit
from common.stages import STAGES, StageSpec, stage
from common.text import TextEncoder, packaged_encoder
from common.unet.packed import packed
from common.unet.unet import UNet
from deploy.local.tritonserver import NICE, TritonServer, TritonSettings, running_triton
from generator_svc.embedded_stage import EmbeddedStage
from generator_svc.export import ExportSettings, export
from generator_svc.stage_backend import StageInfo
from generator_svc.stage_engine import StageEngine
from generator_svc.stage_runtime import StageRuntime
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_metrics import TritonMetrics
from generator_svc.triton_stage import TritonStage

PARTS = ("network", "embedded", "triton", "overhead", "overload")
LIMITS = {
    "overhead_ratio": ("at most", 1.05),
    "neighbor_share": ("at most", 0.05),
    "interleaved_vs_joint": ("at most", 1.05),
    "goodput_at_10x": ("at least", 0.9),
}
HEADLINES = (
    "overhead_ratio",
    "mean_batch_at_8",
    "throughput_vs_step_rpc",
    "throughput_vs_serial",
    "neighbor_share",
    "interleaved_vs_joint",
    "goodput_at_10x",
    "convolution_rate_share",
    "wire_bytes_per_picture",
)
MAX_BATCH = 8
STEP_WAYS = ("step_rpc", "sticky_step_rpc")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured: folder of the weights, repetitions, orders of one load, seconds of overload, CPU threads, and how
    much Triton yields (see `TritonSettings`)."""

    weights: Path
    repeats: int
    orders: int
    seconds: float
    threads: int
    nice: int = NICE


def main() -> int:
    """Run the parts asked for; keeps the figures of the others."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--orders", type=int, default=32, help="pictures drawn for each number of callers")
    parser.add_argument("--seconds", type=float, default=40.0, help="of load at the peak, and of overload")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--nice", type=int, default=NICE, help="how much Triton yields to callers and generator")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    flags = parser.parse_args()
    bench = Bench(
        weights=flags.weights,
        repeats=flags.repeats,
        orders=flags.orders,
        seconds=flags.seconds,
        threads=flags.threads,
        nice=flags.nice,
    )
    torch.set_num_threads(flags.threads)
    figures: dict[str, Any] = json.loads(flags.out.read_text()) if flags.out.is_file() else {}
    for part in flags.parts:
        print(f"measuring {part}", flush=True)
        figures[part] = _RUN[part](bench)
        figures |= headlines(figures) | {"machine": _machine(flags.threads, flags.nice)}
        write_json(flags.out, figures)
        write_atomic(flags.out.with_suffix(".md"), table(figures).encode())
    print(table(figures))
    return 0


def network(bench: Bench) -> dict[str, Any]:
    """Of each stage's network, alone in this process."""
    peak = machine_convolution_rate("cpu", torch.float32)
    figures: dict[str, Any] = {"machine_convolution_gflop_per_s": round(peak / 1e9, 1)}
    for spec in STAGES:
        unet = packed(load_stage(bench.weights, spec.size).unet)
        rows = (1, 4) if spec.neighbors else (1,)
        found = {str(n): convolution_figures(unet, spec, peak, rows=n, repeats=bench.repeats) for n in rows}
        figures[spec.name] = {"steps_of": found}
        if spec.neighbors:
            # Ratios of two times a few hundredths apart: the least of more.
            figures[spec.name] |= guidance_figures(unet, spec, repeats=2 * bench.repeats)
            figures[spec.name] |= neighbor_figures(unet, spec, repeats=2 * bench.repeats)
    return figures


def embedded(bench: Bench) -> dict[str, Any]:
    """Many callers of the first stage in this process."""
    spec = STAGES[0]
    weights, count = load_stage(bench.weights, spec.size), BatchCount()
    runtime = StageRuntime(spec, packed(weights.unet), max_batch=MAX_BATCH, max_live_bytes=1 << 30, on_batch=count)
    info = StageInfo(stage=spec.size, unet=weights.unet.config, version="0", weights_sha256="", parameters=0)
    try:
        draw, orders = drawn_by(EmbeddedStage(runtime, info)), make_orders(spec, bench.orders)
        return {"callers": asyncio.run(throughput(draw, orders, mean_batch=count.so_far, callers=CALLERS))}
    finally:
        runtime.close()


def triton(bench: Bench) -> dict[str, Any]:
    """Many callers of the first stage in Triton, then of a server that takes one RPC a step."""
    spec = STAGES[0]
    orders = make_orders(spec, bench.orders)
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder, _triton(bench, Path(folder)) as server:
        figures = asyncio.run(_served(spec, server, orders))
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder, _steps(bench, Path(folder)) as address:
        steps = {name: asyncio.run(_stepped(address, orders, sticky=name == "sticky_step_rpc")) for name in STEP_WAYS}
    for name, stepped in steps.items():
        for count, rate in stepped["pictures_per_s"].items():
            served = figures["callers"][count]
            served[f"vs_{name}"] = round(served["pictures_per_s"] / rate, 3)
    return figures | steps


async def _served(spec: StageSpec, server: TritonServer, orders: list[StageOrder]) -> dict[str, Any]:
    backend = TritonStage(spec, [server.address], policy=EndpointPolicy(), metrics=TritonMetrics(CollectorRegistry()))
    await backend.open(timeout_s=30.0)
    try:
        batches = triton_batches(server.metrics_address, spec.name)
        return {"callers": await throughput(drawn_by(backend), orders, mean_batch=batches, callers=CALLERS)}
    finally:
        await backend.close()


async def _stepped(address: str, orders: list[StageOrder], *, sticky: bool) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        client = StepClient(channel)
        draw = client.draw_sticky if sticky else client.draw
        await seconds_for(draw, orders[:2], 1)
        client.wire_bytes = 0
        rates = {str(count): round(len(orders) / await seconds_for(draw, orders, count), 3) for count in CALLERS}
    return {"pictures_per_s": rates, "wire_bytes_per_picture": round(client.wire_bytes / len(orders) / len(CALLERS))}


def overheads(bench: Bench) -> dict[str, Any]:
    """One request through generator and Triton, whole, against the same work in a bare loop."""
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder, _stack(bench, Path(folder)) as (_, served):
        unets = {spec.size: packed(load_stage(bench.weights, spec.size).unet) for spec in STAGES}
        encoder = TextEncoder(packaged_encoder())
        return {
            str(size): overhead(served.address, _bare_loop(unets, encoder, size), stop_at=size, repeats=bench.repeats)
            for size in (64, 1024)
        }


def overload(bench: Bench) -> dict[str, Any]:
    """Ten times more requests than generator and Triton can carry out."""
    with (
        tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder,
        _stack(bench, Path(folder)) as (server, served),
    ):
        return overloaded(served, stop_at=256, callers=8, seconds=bench.seconds, triton_pid=server.pid)


def _bare_loop(unets: dict[int, UNet], encoder: TextEncoder, stop_at: int) -> Callable[[], object]:
    """Text, stages and PNG, each called as a function."""
    sizes = [spec.size for spec in STAGES if spec.size <= stop_at]
    engines = {
        size: StageEngine(stage(size), unets[size], max_batch=MAX_BATCH, max_live_bytes=1 << 30) for size in sizes
    }

    def draw() -> bytes:
        encoder.encode([PROMPT, "a guide dog, drawing 0", "a guide dog, drawing 1"])
        pictures: np.ndarray | None = None
        for size in sizes:
            inputs = make_stage_inputs(stage(size), 3)
            if pictures is not None:
                inputs = _with_low_res(inputs, pictures)
            plan = stage(size).plan(3)
            job = engines[size].begin([replace(plan, steps=BASE_STEPS) if size == sizes[0] else plan], inputs)
            while job.pictures is None:
                engines[size].advance([job])
            pictures = job.pictures
        assert pictures is not None
        return encode_png(from_unit(np.moveaxis(pictures[0], 0, -1)), {})

    return draw


def _with_low_res(inputs: Any, pictures: np.ndarray) -> Any:
    return type(inputs)(**{**vars(inputs), "low_res": pictures})


@contextmanager
def _triton(bench: Bench, folder: Path) -> Iterator[TritonServer]:
    export(ExportSettings(weights=bench.weights, repository=folder / "models", threads=bench.threads))
    settings = TritonSettings(repository=folder / "models", log=folder / "triton.log", nice=bench.nice)
    with running_triton(settings) as server:
        yield server


@contextmanager
def _stack(bench: Bench, folder: Path) -> Iterator[tuple[TritonServer, Served]]:
    with (
        _triton(bench, folder) as server,
        generator(folder, "--stages=triton", f"--triton-addresses={server.address}") as served,
    ):
        yield server, served


@contextmanager
def _steps(bench: Bench, folder: Path) -> Iterator[str]:
    address = f"unix:{folder}/steps.sock"
    flags = {"size": STAGES[0].size, "weights": bench.weights, "address": address, "threads": bench.threads}
    command = [sys.executable, "-m", "bench.serving_steps", *(f"--{name}={value}" for name, value in flags.items())]
    child = subprocess.Popen([*command, f"--parent-pid={os.getpid()}"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if not child.stdout.readline().startswith("ready"):
            raise RuntimeError("the server of steps did not start")
        yield address
    finally:
        child.terminate()
        child.wait(30)


def headlines(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that are asked for by name, of the parts that were measured."""
    found: dict[str, Any] = {}
    if "network" in figures:
        first = figures["network"][STAGES[0].name]
        found |= {name: first[name] for name in ("neighbor_share", "interleaved_vs_joint")}
        found["convolution_rate_share"] = first["steps_of"]["1"]["convolution_rate_share"]
    served = figures.get("triton", figures.get("embedded"))
    if served:
        at_8 = served["callers"]["8"]
        found |= {"mean_batch_at_8": at_8["mean_batch"], "throughput_vs_serial": at_8["vs_serial"]}
        if "vs_step_rpc" in at_8:
            found["throughput_vs_step_rpc"] = at_8["vs_step_rpc"]
    if "overhead" in figures:
        whole = figures["overhead"]["1024"]
        found["overhead_ratio"] = whole["overhead_ratio"]
        found["wire_bytes_per_picture"] = whole["request_bytes"] + whole["response_bytes"]
    if "overload" in figures:
        found["goodput_at_10x"] = figures["overload"]["goodput_at_10x"]
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = ["| figure | measured | wanted |", "|---|---|---|"]
    for name in HEADLINES:
        wanted = " ".join(map(str, LIMITS[name])) if name in LIMITS else ""
        lines.append(f"| {name} | {figures.get(name, '-')} | {wanted} |")
    for part in ("embedded", "triton"):
        if part in figures:
            columns = ("pictures_per_s", "vs_serial", "mean_batch", *(f"vs_{name}" for name in STEP_WAYS))
            lines += ["", f"| callers, {part} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
            for count, row in figures[part]["callers"].items():
                lines.append(f"| {count} | " + " | ".join(str(row.get(column, "-")) for column in columns) + " |")
    if "overload" in figures:
        lines += ["", "| ten times more than it can do | |", "|---|---|"]
        for name, value in figures["overload"].items():
            said = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
            lines.append(f"| {name} | {said} |")
    if "network" in figures:
        first = figures["network"][STAGES[0].name]
        shares = dict(first.get("neighbor_share_of_steps", {}))  # not in figures of before
        if "neighbor_share_together" in first:
            shares[f"{first['steps']}, {TOGETHER} at once"] = first["neighbor_share_together"]
        lines += ["", "| steps of the first stage | encoding neighbors, share of the trajectory |", "|---|---|"]
        lines += [f"| {steps} | {share} |" for steps, share in shares.items()]
        lines += ["", "| where a step's time goes | share |", "|---|---|"]
        for name in (spec.name for spec in STAGES):
            for rows, step in figures["network"][name]["steps_of"].items():
                of_rate = f"{step['convolution_rate_share']} of the convolution rate"
                lines.append(f"| **{name}, {rows} at once**, {step['step_ms']} ms | {of_rate} |")
                lines += [f"| {kind} | {share} |" for kind, share in step["where_time_goes"].items()]
    return "\n".join(lines) + "\n"


def _machine(threads: int, nice: int) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "triton_nice": nice,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


_RUN: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "network": network,
    "embedded": embedded,
    "triton": triton,
    "overhead": overheads,
    "overload": overload,
}


if __name__ == "__main__":
    sys.exit(main())
