"""Retrieve, encode, 64, 256, 1024, picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from common.diffusion.plan import Plan
from common.images import encode_png, from_unit
from common.service.errors import DeadlineExceeded
from common.text import MAX_TOKENS
from generator_svc.events import (
    Accepted,
    Done,
    Event,
    Image,
    NeighborsFound,
    StageFinished,
    StageStarted,
    StepDone,
)
from generator_svc.metrics import GeneratorMetrics
from generator_svc.neighbors import Retrieved
from generator_svc.order import CheckedOrder, Order, StageReads, check_order
from generator_svc.progress import Progress, Step
from generator_svc.record import full_record, order_record, picture_chunks
from generator_svc.stage_inputs import EncodedTexts, StageInputs, Texts, make_inputs
from generator_svc.stage_runtime import Seat, StageRuntime


class Retriever(Protocol):
    """Finds the neighbors of an order."""

    async def retrieve(self, order: Order, k: int, *, timeout_s: float) -> Retrieved:
        """The k best pairs for the order's prompt."""
        ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the pipeline may know of whoever waits for the pictures."""

    is_cancelled: Callable[[], bool] = lambda: False
    time_remaining_s: Callable[[], float | None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that can be run, and the sha256 of its weights."""

    runtime: StageRuntime
    sha256: str


@dataclass(kw_only=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


class Pipeline:
    """Draws orders. Everything that it needs is given to it."""

    def __init__(
        self,
        *,
        retriever: Retriever,
        texts: Texts,
        text_encoder: str,
        stages: Mapping[int, Stage],
        metrics: GeneratorMetrics,
        retrieval_timeout_s: float,
    ) -> None:
        """`stages` by the side of their pictures; `text_encoder` is the name that records bear."""
        self._retriever = retriever
        self._texts = texts
        self._text_encoder = text_encoder
        self._stages = stages
        self._metrics = metrics
        self._retrieval_timeout_s = retrieval_timeout_s

    async def draw(self, order: Order, call: Call) -> AsyncIterator[Event]:
        """Draw an order, and say what happens.

        Raises:
            ServiceError: the order cannot be carried out, or not now; see generator.proto.
        """
        checked = check_order(order, {size: _reads(stage) for size, stage in self._stages.items()})
        order, clock, pictures = checked.order, _Clock(), None
        with ExitStack() as held, clock.time("total"):
            seats = {plan.stage: held.enter_context(self._reserve(checked, plan)) for plan in checked.plans}
            yield Accepted(prompt=order.prompt, seed=checked.seed, num_pictures=order.num_pictures, stages=tuple(seats))
            with clock.time("retrieve"):
                retrieved = await self._retrieve(checked, call)
            yield NeighborsFound(retrieved=retrieved)
            with clock.time("encode"):
                texts = await self._encode(order.prompt, retrieved)
            for plan in checked.plans:
                yield StageStarted(stage=plan.stage, steps=plan.steps)
                with clock.time(f"stage_{plan.stage}"), self._metrics.stage_s.labels(plan.stage).time():
                    inputs = await self._make_inputs(plan, texts, retrieved, pictures)
                    progress = Progress(preview_every=order.preview_every)
                    future = seats[plan.stage].submit(
                        checked.stage_plans(plan), inputs, on_step=progress.report, is_cancelled=call.is_cancelled
                    )
                    async for step in progress.until_done(future):
                        yield await _step_done(plan, step)
                    pictures = await asyncio.wrap_future(future)
                for picture, pixels in enumerate(pictures):
                    is_last = plan.stage == order.stop_at
                    yield StageFinished(stage=plan.stage, picture=picture, png=b"" if is_last else await _png(pixels))
            assert pictures is not None, "an order has at least one stage"
            weights = {size: stage.sha256 for size, stage in self._stages.items()}
            common = order_record(checked, retrieved, weights=weights, text_encoder=self._text_encoder)
            with clock.time("png"):
                for picture, pixels in enumerate(pictures):
                    png = await _png(pixels, picture_chunks(common, checked.plans, picture))
                    self._metrics.pictures.labels(order.stop_at).inc()
                    yield Image(picture=picture, png=png)
        yield Done(record=full_record(common, checked, clock.seconds))

    @contextmanager
    def _reserve(self, checked: CheckedOrder, plan: Plan) -> Iterator[Seat]:
        """Room in a stage, taken for the whole order: none is turned away when half of its work is done."""
        runtime = self._stages[plan.stage].runtime
        gauge = self._metrics.taken_bytes.labels(plan.stage)
        try:
            with runtime.reserve(
                num_pictures=checked.order.num_pictures, num_tokens=MAX_TOKENS, num_neighbors=checked.k
            ) as seat:
                gauge.set(runtime.taken_bytes)
                yield seat
        finally:
            gauge.set(runtime.taken_bytes)

    async def _retrieve(self, checked: CheckedOrder, call: Call) -> Retrieved:
        """Ask retrieval, within what is left of the caller's deadline; a failure is fatal to the order."""
        if checked.order.without_neighbors:
            return Retrieved()
        remaining_s = call.time_remaining_s()
        timeout_s = self._retrieval_timeout_s if remaining_s is None else min(remaining_s, self._retrieval_timeout_s)
        if timeout_s <= 0:
            raise DeadlineExceeded("the caller's deadline has passed")
        return await self._retriever.retrieve(checked.order, checked.k, timeout_s=timeout_s)

    async def _encode(self, prompt: str, retrieved: Retrieved) -> EncodedTexts:
        captions = [neighbor.caption for neighbor in retrieved.neighbors]
        return await asyncio.to_thread(self._texts.encode, prompt, captions)

    async def _make_inputs(
        self, plan: Plan, texts: EncodedTexts, retrieved: Retrieved, low_res: np.ndarray | None
    ) -> StageInputs:
        unet = self._stages[plan.stage].runtime.config
        return await asyncio.to_thread(make_inputs, unet, plan.stage, texts, retrieved.neighbors, low_res)


def _reads(stage: Stage) -> StageReads:
    return StageReads(text=stage.runtime.config.text_width > 0, neighbors=stage.runtime.config.uses_neighbors)


async def _step_done(plan: Plan, step: Step) -> StepDone:
    preview = b"" if step.x0 is None else await _png(step.x0)
    return StepDone(stage=plan.stage, picture=step.picture, step=step.step, steps=plan.steps, preview_png=preview)


async def _png(pixels: np.ndarray, chunks: Mapping[str, str] | None = None) -> bytes:
    """PNG of float [3, S, S] in [-1, 1]."""
    return await asyncio.to_thread(lambda: encode_png(from_unit(np.moveaxis(pixels, 0, -1)), chunks))
