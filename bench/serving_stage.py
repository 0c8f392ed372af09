"""Load on one stage, wherever it runs: so many callers, each with the next order as soon as its last one is drawn."""

from __future__ import annotations

import asyncio
import itertools
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.diffusion.guidance import Guidance, Strategy
from common.diffusion.plan import Plan
from common.stages import StageSpec
from generator_svc.call import Call
from generator_svc.stage_backend import StageBackend, StageNeeds
from generator_svc.stage_inputs import StageInputs

NUM_NEIGHBORS, NUM_TOKENS, TEXT_WIDTH = 2, 16, 384
CALLERS = (1, 2, 4, 8, 16)
MIX: tuple[tuple[int, Strategy], ...] = ((6, "interleaved"), (8, "weighted"), (10, "joint"), (12, "interleaved"))

Draw = Callable[["StageOrder"], Awaitable[object]]


@dataclass(frozen=True, kw_only=True)
class StageOrder:
    """One picture in one stage."""

    plan: Plan
    inputs: StageInputs


def make_orders(spec: StageSpec, count: int) -> list[StageOrder]:
    """Orders of different steps, strategies, weights, seeds and neighbors."""
    orders = []
    for number, (steps, strategy) in zip(range(count), itertools.cycle(MIX), strict=False):
        guidance = Guidance(strategy=strategy, text_weight=2.0 + number % 3, neighbor_weight=3.0, eta=0.4)
        plan = replace(spec.plan(number), steps=steps, guidance=guidance)
        orders.append(StageOrder(plan=plan, inputs=make_stage_inputs(spec, number)))
    return orders


def make_stage_inputs(spec: StageSpec, number: int, *, text_width: int = TEXT_WIDTH) -> StageInputs:
    """Random inputs of the demonstration's sizes."""
    source = np.random.default_rng(number)
    tokens, neighbors = (NUM_TOKENS, NUM_NEIGHBORS) if spec.neighbors else (0, 0)
    width = text_width if tokens else 0
    return StageInputs(
        text=source.standard_normal((tokens, width), np.float32),
        text_mask=np.ones(tokens, np.bool_),
        neighbors=source.integers(0, 256, (neighbors, spec.size, spec.size, 3), np.uint8),
        neighbor_text=source.standard_normal((neighbors, tokens, width), np.float32),
        neighbor_text_mask=np.ones((neighbors, tokens), np.bool_),
        low_res=source.uniform(-1, 1, (1, 3, spec.low_res_size, spec.low_res_size)).astype(np.float32)
        if spec.low_res_size
        else None,
    )


def drawn_by(stage: StageBackend) -> Draw:
    """Draws by a backend."""

    async def draw(order: StageOrder) -> object:
        needs = StageNeeds(num_pictures=1, num_tokens=NUM_TOKENS, num_neighbors=NUM_NEIGHBORS)
        async with stage.reserve(needs) as seat:
            return await seat.run([order.plan], order.inputs, on_step=lambda *_: None, preview_every=0, call=Call())

    return draw


async def seconds_for(draw: Draw, orders: Sequence[StageOrder], callers: int) -> float:
    """Seconds until so many callers have drawn all orders."""
    turn = iter(orders)

    async def call() -> None:
        for order in turn:
            await draw(order)

    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return time.perf_counter() - started


async def throughput(
    draw: Draw, orders: Sequence[StageOrder], *, mean_batch: Callable[[], tuple[float, float]], callers: Sequence[int]
) -> dict[str, Any]:
    """Pictures per second by the number of callers, against one at a time, and how full the batches were.

    Args:
        mean_batch: (steps of trajectories, batches) so far.
    """
    await seconds_for(draw, orders[:2], 1)
    by_callers: dict[str, Any] = {}
    for count in callers:
        before = mean_batch()
        seconds = await seconds_for(draw, orders, count)
        after = mean_batch()
        batches = after[1] - before[1]
        by_callers[str(count)] = {
            "pictures_per_s": round(len(orders) / seconds, 3),
            "mean_batch": round((after[0] - before[0]) / batches, 2) if batches else None,
        }
    serial = by_callers[str(callers[0])]["pictures_per_s"]
    for figures in by_callers.values():
        figures["vs_serial"] = round(figures["pictures_per_s"] / serial, 3)
    return by_callers


class BatchCount:
    """Counts batches; an `OnBatch` of the stage runtime."""

    def __init__(self) -> None:
        self.trajectories = self.batches = 0

    def __call__(self, trajectories: int, seconds: float) -> None:
        self.trajectories += trajectories
        self.batches += 1

    def so_far(self) -> tuple[float, float]:
        """(steps of trajectories, batches)."""
        return self.trajectories, self.batches


def triton_batches(metrics_address: str, model: str) -> Callable[[], tuple[float, float]]:
    """The same of a model in Triton, from its metrics."""

    def so_far() -> tuple[float, float]:
        with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()

        def value(name: str) -> float:
            return sum(
                float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and f'"{model}"' in line
            )

        return value("nv_inference_count"), value("nv_inference_exec_count")

    return so_far
