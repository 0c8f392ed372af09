"""A stage's engine on a thread of its own: the in-process default.

At every round all live trajectories take one step; new ones join between rounds, each ends on its own, and one that
nobody waits for any more is dropped before its next step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from common.diffusion.plan import Plan
from common.service.errors import Unavailable
from common.stages import StageSpec
from common.unet.config import UNetConfig
from common.unet.unet import UNet
from generator_svc.stage_engine import Job, OnBatch, StageEngine
from generator_svc.stage_inputs import StageInputs

OnStep = Callable[[int, int, Tensor], object]
"""(picture, steps done, estimated x0 float32 [3, S, S]), on the runtime's thread."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Order:
    plans: tuple[Plan, ...]
    inputs: StageInputs
    on_step: OnStep
    is_cancelled: Callable[[], bool]
    future: Future[np.ndarray] = field(default_factory=Future)

    def is_over(self) -> bool:
        if self.is_cancelled():
            self.future.cancel()
        return self.future.done()

    def end(self, ending: np.ndarray | Exception) -> None:
        """Give the future its result, or its error; nothing where it has ended already."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(ending, Exception):
            self.future.set_exception(ending)
        else:
            self.future.set_result(ending)


class Seat:
    """Room for one order's pictures in a stage, taken before any work is done for them."""

    def __init__(self, runtime: StageRuntime, num_pictures: int) -> None:
        self._runtime = runtime
        self._num_pictures = num_pictures
        self._submitted: list[_Order] = []

    def submit(
        self, plans: Sequence[Plan], inputs: StageInputs, *, on_step: OnStep, is_cancelled: Callable[[], bool]
    ) -> Future[np.ndarray]:
        """Run a trajectory for each plan.

        Args:
            plans: one for each picture; they differ in `sample`.
            inputs: what they are conditioned on.
            on_step: told after every step of every picture.
            is_cancelled: asked before every step; cancelling the future does the same.

        Returns:
            A future of float32 in [-1, 1] [P, 3, S, S].
        """
        assert len(plans) == self._num_pictures, "a seat is taken for the pictures that are then submitted"
        order = _Order(plans=tuple(plans), inputs=inputs, on_step=on_step, is_cancelled=is_cancelled)
        self._submitted.append(order)
        self._runtime.join(order)
        return order.future

    def leave(self) -> None:
        """Drop what was submitted and is not done."""
        for order in self._submitted:
            order.future.cancel()


class StageRuntime:
    """Runs the trajectories of one stage. `close` ends its thread."""

    def __init__(
        self,
        spec: StageSpec,
        unet: UNet,
        *,
        max_batch: int,
        max_live_bytes: int,
        on_batch: OnBatch = lambda trajectories, seconds: None,
    ) -> None:
        """Start the thread; see `StageEngine` for the arguments."""
        self.spec = spec
        self.config: UNetConfig = unet.config
        self._engine = StageEngine(spec, unet, max_batch=max_batch, max_live_bytes=max_live_bytes, on_batch=on_batch)
        self._changed = threading.Condition()
        self._joining: list[_Order] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name=f"stage-{spec.size}", daemon=True)
        self._thread.start()

    @property
    def taken_bytes(self) -> int:
        """Bytes that the admitted orders keep, or will keep."""
        return self._engine.room.taken

    @contextmanager
    def reserve(self, *, num_pictures: int, num_tokens: int, num_neighbors: int) -> Iterator[Seat]:
        """Take room for an order, for as long as the block lasts; what is not done at its end is dropped.

        Raises:
            ResourceExhausted: the admitted orders and this one would keep more than `max_live_bytes`.
        """
        needed = self._engine.needed_bytes(
            num_pictures=num_pictures, num_tokens=num_tokens, num_neighbors=num_neighbors
        )
        self._engine.room.take(needed, num_pictures=num_pictures)
        seat = Seat(self, num_pictures)
        try:
            yield seat
        finally:
            seat.leave()
            self._engine.room.give_back(needed)

    def join(self, order: _Order) -> None:
        """Let an order in at the next round; called by its seat."""
        with self._changed:
            if self._is_closing:
                raise Unavailable("the service is stopping")
            self._joining.append(order)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step under way; orders that are not done fail as Unavailable."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        live: dict[Job, _Order] = {}
        while True:
            with self._changed:
                while not (self._is_closing or self._joining or live):
                    self._changed.wait()
                joining, self._joining = self._joining, []
                is_closing = self._is_closing
            if is_closing:
                for order in (*joining, *live.values()):
                    order.end(Unavailable("the service is stopping"))
                return
            for order in joining:
                if (job := self._begin(order)) is not None:
                    live[job] = order
            self._round(live)
            live = {job: order for job, order in live.items() if not job.is_over and not order.is_over()}

    def _begin(self, order: _Order) -> Job | None:
        if order.is_over():
            return None
        try:
            return self._engine.begin(order.plans, order.inputs)
        except Exception as error:  # whatever it is, it ends this order and not the thread
            log.warning("stage %d: an order could not begin", self.spec.size, exc_info=True)
            order.end(error)
            return None

    def _round(self, live: dict[Job, _Order]) -> None:
        def tell() -> None:
            for job, order in live.items():
                self._tell(job, order)

        self._engine.advance(list(live), is_over=lambda job: job.is_over or live[job].is_over(), after_batch=tell)

    def _tell(self, job: Job, order: _Order) -> None:
        try:
            for step in job.take_moved():
                order.on_step(step.picture, step.step, step.x0)
        except Exception as error:  # what one order does with its steps is no other's concern
            log.exception("stage %d: telling a step failed", self.spec.size)
            job.fail(error)
        if job.error is not None:
            order.end(job.error)
        elif job.pictures is not None:
            order.end(job.pictures)
