"""Retrieve, encode, 64, 256, 1024, picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field

import numpy as np

from common.diffusion.plan import Plan
from common.images import to_unit
from common.pictures import Picture
from common.service.errors import ResourceExhausted
from common.stages import stage as stage_spec
from common.text import MAX_TOKENS
from generator_svc.admission import Admission, Ticket
from generator_svc.call import Call
from generator_svc.estimates import stage_work
from generator_svc.events import (
    Accepted,
    Done,
    Event,
    Image,
    NeighborsFound,
    Queued,
    StageFinished,
    StageStarted,
    StepDone,
)
from generator_svc.metrics import NO_NEIGHBORS, ONE_LEG, GeneratorMetrics, OrderClock
from generator_svc.neighbor_source import NeighborSource
from generator_svc.neighbors import Neighbor, Retrieved, draw_neighbors
from generator_svc.order import CheckedOrder, Order, StageReads
from generator_svc.order_rules import check_order, without_retrieved
from generator_svc.picture_files import encode, read, small_square, square
from generator_svc.progress import Progress, Step
from generator_svc.record import full_record, order_record, picture_record
from generator_svc.recorded_order import check_recorded_order, check_weights
from generator_svc.stage_backend import StageBackend, StageInfo, StageNeeds, StageSeat, TextBackend
from generator_svc.stage_inputs import EncodedTexts, OrderTexts, StageInputs, Start, make_inputs
from generator_svc.waiting_line import Priority

_BESIDE = ("retrieve", "encode", "encode_pictures")  # what an order takes beside its stages


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


@contextmanager
def _under_way(work: Coroutine[None, None, np.ndarray]) -> Iterator[asyncio.Task[np.ndarray]]:
    """Work that goes on while the block listens to it, and is cancelled where the block is left."""
    task = asyncio.ensure_future(work)
    try:
        yield task
    finally:
        task.cancel()


class Pipeline:
    """Draws orders. Everything that it needs is given to it, and it does not know where any of it runs."""

    def __init__(
        self,
        *,
        neighbors: NeighborSource,
        texts: TextBackend,
        stages: Mapping[int, StageBackend],
        metrics: GeneratorMetrics,
        admission: Admission,
    ) -> None:
        """`stages` by the side of their pictures."""
        self._neighbors = neighbors
        self._texts = texts
        self._stages = stages
        self._metrics = metrics
        self._admission = admission

    @property
    def text_encoder(self) -> str:
        """Its name."""
        return self._texts.name

    async def models(self) -> list[StageInfo]:
        """The stages as they are served now, in the order in which they are run.

        Raises:
            Unavailable: a stage is not served anywhere.
        """
        return [await self._stages[size].info() for size in sorted(self._stages)]

    async def draw(self, order: Order, call: Call) -> AsyncGenerator[Event, None]:
        """Draw an order, and say what happens.

        Raises:
            ServiceError: the order cannot be carried out, or not now; see generator.proto.
        """
        with self._metrics.order(order.priority, call) as watch:
            async with aclosing(self._drawn(order, call, watch)) as events:
                async for event in events:
                    if isinstance(event, StepDone) and event.preview_png:
                        watch.previewed()
                    yield event

    async def _drawn(self, order: Order, call: Call, watch: OrderClock) -> AsyncGenerator[Event, None]:
        reads = {info.stage: _reads(info) for info in await self.models()}
        checked = check_recorded_order(order) if order.record_json else check_order(order, reads)
        watch.resolution = checked.sizes[-1]
        clock, pictures = _Clock(), None
        async with AsyncExitStack() as held:
            held.enter_context(clock.time("total"))
            ticket = held.enter_context(self._admit(checked, call))
            watch.alone_s = self._admission.times.alone_s(ticket.works)
            if has_waited := ticket.position > 0:
                yield _accepted(checked, ticket)
                with clock.time("wait"):
                    async for position in ticket.positions():
                        yield Queued(queue_position=position)
            seats = await self._take_seats(checked, held, is_patient=has_waited)
            if not has_waited:
                yield _accepted(checked, ticket)
            begun_with = await asyncio.to_thread(_begin_with, checked.order)
            with clock.time("retrieve"):
                retrieved = await self._neighbors.find(checked, call)
            if retrieved.degraded_reason and checked.recorded is None:
                self._metrics.degraded.labels(NO_NEIGHBORS).inc()
                checked = without_retrieved(checked, reads)
            if retrieved.failed_legs:
                self._metrics.degraded.labels(ONE_LEG).inc()
            yield NeighborsFound(retrieved=retrieved)
            with clock.time("encode"):
                texts, encoded = await self._encode(checked.order, retrieved, call)
            for plans in checked.stages:
                size = plans[0].stage
                yield StageStarted(stage=size, steps=plans[0].steps)
                with clock.time(f"stage_{size}"), self._metrics.stage_s.labels(size).time():
                    start = await asyncio.to_thread(_start, begun_with, plans, pictures)
                    shown = await asyncio.to_thread(_shown, seats[size].info, retrieved.neighbors)
                    inputs = make_inputs(seats[size].info.unet, size, texts, encoded, shown, start)
                    progress, every = Progress(), checked.order.preview_every
                    with _under_way(_run(ticket, seats[size], plans, inputs, progress, every, call)) as running:
                        async for step in progress.until_done(running):
                            yield await _step_done(plans[0], step)
                        pictures = await running
                async for finished in _finished(checked, size, pictures):
                    yield finished
            assert pictures is not None, "an order has at least one stage"
            self._check_drawn(checked, seats)
            infos = {size: seat.info for size, seat in seats.items()}
            common = order_record(checked, retrieved, infos=infos, text_encoder=self.text_encoder)
            with clock.time("encode_pictures"):
                async for image in _images(checked, pictures, common):
                    self._metrics.pictures.labels(checked.sizes[-1]).inc()
                    yield image
        self._admission.times.learn_beside(sum(clock.seconds[name] for name in _BESIDE))
        yield Done(record=full_record(common, checked, clock.seconds, infos=infos))

    def _admit(self, checked: CheckedOrder, call: Call) -> Ticket:
        """An order's place among the others; decided at once, before any work is done for it."""
        works = [stage_work(plans[0], len(plans)) for plans in checked.stages]
        return self._admission.take(works, Priority[checked.order.priority.upper()], call)

    async def _take_seats(
        self, checked: CheckedOrder, held: AsyncExitStack, *, is_patient: bool
    ) -> dict[int, StageSeat]:
        """Room in every stage, held until `held` is left.

        Room is taken for the whole order: none is turned away when half of its work is done. One that has waited for its
        turn waits for room as well.
        """
        while True:
            try:
                async with AsyncExitStack() as taken:
                    seats = await self._reserve(checked, taken)
                    held.push_async_exit(taken.pop_all())
                    return seats
            except ResourceExhausted as error:
                if not is_patient or error.retry_after_s is None or self._admission.num_running == 1:
                    raise
            await self._admission.next_leaving()

    async def _reserve(self, checked: CheckedOrder, held: AsyncExitStack) -> dict[int, StageSeat]:
        num_texts = 1 + bool(checked.order.negative_prompt)
        needs = StageNeeds(
            num_pictures=checked.num_pictures,
            num_tokens=num_texts * MAX_TOKENS,
            num_neighbors=checked.num_neighbors,
        )
        seats = {size: await held.enter_async_context(self._stages[size].reserve(needs)) for size in checked.sizes}
        self._check_drawn(checked, seats)
        return seats

    def _check_drawn(self, checked: CheckedOrder, seats: Mapping[int, StageSeat]) -> None:
        """A record is drawn again with its own weights: asked before the work, and after it, since they can be replaced."""
        if checked.recorded is not None:
            served = {size: seat.info.weights_sha256 for size, seat in seats.items()}
            check_weights(checked.recorded, served, self.text_encoder)

    async def _encode(self, order: Order, retrieved: Retrieved, call: Call) -> tuple[OrderTexts, EncodedTexts]:
        captions = tuple(neighbor.caption for neighbor in retrieved.neighbors)
        texts = OrderTexts(prompt=order.prompt, negative=order.negative_prompt, captions=captions)
        return texts, await self._texts.encode(texts.in_order(), call=call)


def _accepted(checked: CheckedOrder, ticket: Ticket) -> Accepted:
    return Accepted(
        prompt=checked.order.prompt,
        seeds=checked.seeds,
        stages=checked.sizes,
        queue_position=ticket.position,
    )


async def _run(
    ticket: Ticket,
    seat: StageSeat,
    plans: Sequence[Plan],
    inputs: StageInputs,
    progress: Progress,
    preview_every: int,
    call: Call,
) -> np.ndarray:
    """Run a stage, and let admission know how it goes."""
    with ticket.visit(plans[0].stage) as visit:

        def on_step(picture: int, step: int, x0: np.ndarray | None) -> None:
            visit.step(step)
            progress.report(picture, step, x0)

        return await seat.run(plans, inputs, on_step=on_step, preview_every=preview_every, call=call)


def _reads(info: StageInfo) -> StageReads:
    return StageReads(text=info.unet.text_width > 0, neighbors=info.unet.uses_neighbors)


def _begin_with(order: Order) -> Picture | None:
    """The caller's picture to begin with."""
    return None if order.start_from is None else read("start_from.image", order.start_from.image)


def _start(begun_with: Picture | None, plans: Sequence[Plan], before: np.ndarray | None) -> Start:
    """What a stage begins with: what the stage before made, or the caller's picture."""
    if before is not None or begun_with is None:
        return Start(low_res=before)
    spec, low_res, start = stage_spec(plans[0].stage), None, None
    if spec.low_res_size:
        small = np.moveaxis(to_unit(small_square(begun_with, spec.size, spec.scale)), -1, 0)
        low_res = np.repeat(small[None], len(plans), 0)
    if plans[0].start_time < 1.0:
        start = np.moveaxis(to_unit(square(begun_with, spec.size)), -1, 0)[None]
    return Start(low_res=low_res, picture=start)


def _shown(info: StageInfo, neighbors: Sequence[Neighbor]) -> np.ndarray:
    """The neighbors' pictures as a stage reads them; none where it reads none."""
    return draw_neighbors(neighbors if info.unet.uses_neighbors else (), info.stage)


async def _step_done(plan: Plan, step: Step) -> StepDone:
    preview = b"" if step.x0 is None else await asyncio.to_thread(encode, step.x0, "png")
    return StepDone(stage=plan.stage, picture=step.picture, step=step.step, steps=plan.steps, preview_png=preview)


async def _finished(checked: CheckedOrder, size: int, pictures: np.ndarray) -> AsyncIterator[StageFinished]:
    """That the pictures have left a stage, with the pictures where they are asked for and are not the last ones."""
    is_shown = checked.order.every_stage and size != checked.sizes[-1]
    for picture, pixels in enumerate(pictures):
        image = await asyncio.to_thread(encode, pixels, checked.order.image_format) if is_shown else b""
        yield StageFinished(stage=size, picture=picture, image=image)


async def _images(checked: CheckedOrder, pictures: np.ndarray, common: Mapping[str, object]) -> AsyncIterator[Image]:
    image_format = checked.order.image_format
    for picture, pixels in enumerate(pictures):
        record = picture_record(common, checked, picture)
        image = await asyncio.to_thread(encode, pixels, image_format, record)
        seed = checked.seeds[picture]
        yield Image(picture=picture, image=image, image_format=image_format, seed=seed, record_json=record)
