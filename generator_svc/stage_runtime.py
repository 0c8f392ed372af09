"""One stage's U-Net and the trajectories that live beside it, advanced by continuous batching on a thread of its own.

At every round all live trajectories take one step, in batches of at most `max_batch`; new ones join between rounds,
each ends on its own, and one that nobody waits for any more is dropped before its next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from common.diffusion.plan import Plan
from common.images import to_unit
from common.service.errors import ResourceExhausted, Unavailable
from common.stages import StageSpec
from common.trajectories import Trajectory, begin, noised_low_res, step_together
from common.unet.condition import Condition
from common.unet.config import PLACEMENT_SIZE, UNetConfig
from common.unet.unet import UNet
from generator_svc.stage_inputs import StageInputs

RETRY_AFTER_S = 5.0

OnStep = Callable[[int, int, Tensor], object]
"""(picture, steps done, estimated x0 float32 [3, S, S]), on the runtime's thread."""
OnBatch = Callable[[int, float], object]
"""(trajectories, seconds) of one batch, for metrics."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Job:
    plans: tuple[Plan, ...]
    inputs: StageInputs
    on_step: OnStep
    is_cancelled: Callable[[], bool]
    future: Future[np.ndarray] = field(default_factory=Future)
    finished: dict[int, np.ndarray] = field(default_factory=dict)

    def is_over(self) -> bool:
        if self.is_cancelled():
            self.future.cancel()
        return self.future.done()

    def fail(self, error: Exception) -> None:
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, picture: int, x0: np.ndarray) -> None:
        self.finished[picture] = x0
        if len(self.finished) == len(self.plans) and self.future.set_running_or_notify_cancel():
            self.future.set_result(np.stack([self.finished[i] for i in range(len(self.plans))]))


@dataclass(kw_only=True, eq=False)
class _Live:
    job: _Job
    picture: int
    trajectory: Trajectory


class Seat:
    """Room for one order's pictures in a stage, taken before any work is done for them."""

    def __init__(self, runtime: StageRuntime, num_pictures: int) -> None:
        self._runtime = runtime
        self._num_pictures = num_pictures
        self._submitted: list[_Job] = []

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
        job = _Job(plans=tuple(plans), inputs=inputs, on_step=on_step, is_cancelled=is_cancelled)
        self._submitted.append(job)
        self._runtime.join(job)
        return job.future

    def leave(self) -> None:
        """Drop what was submitted and is not done."""
        for job in self._submitted:
            job.future.cancel()


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
        """Start the thread.

        Args:
            spec: the stage.
            unet: its network, in evaluation mode.
            max_batch: trajectories that share one pass of the network.
            max_live_bytes: bound on what all admitted orders keep in memory, see `live_bytes`.
            on_batch: told about every batch.
        """
        self.spec = spec
        self.config: UNetConfig = unet.config
        self._unet = unet
        self._max_batch = max_batch
        self._max_live_bytes = max_live_bytes
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._taken_bytes = 0
        self._joining: list[_Job] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name=f"stage-{spec.size}", daemon=True)
        self._thread.start()

    @property
    def taken_bytes(self) -> int:
        """Bytes that the admitted orders keep, or will keep."""
        return self._taken_bytes

    @contextmanager
    def reserve(self, *, num_pictures: int, num_tokens: int, num_neighbors: int) -> Iterator[Seat]:
        """Take room for an order, for as long as the block lasts; what is not done at its end is dropped.

        Raises:
            ResourceExhausted: the admitted orders and this one would keep more than `max_live_bytes`.
        """
        needed = live_bytes(
            self.config,
            self.spec.size,
            num_pictures=num_pictures,
            num_tokens=num_tokens,
            num_neighbors=num_neighbors,
            element_bytes=self._unet.dtype.itemsize,
        )
        with self._changed:
            if self._taken_bytes + needed > self._max_live_bytes:
                raise ResourceExhausted(
                    f"stage {self.spec.size}: {num_pictures} pictures need {needed >> 20} MiB beside the"
                    f" {self._taken_bytes >> 20} MiB of others; the limit is {self._max_live_bytes >> 20} MiB",
                    retry_after_s=RETRY_AFTER_S if self._taken_bytes else None,
                )
            self._taken_bytes += needed
        seat = Seat(self, num_pictures)
        try:
            yield seat
        finally:
            seat.leave()
            with self._changed:
                self._taken_bytes -= needed

    def join(self, job: _Job) -> None:
        """Let a job in at the next round; called by its seat."""
        with self._changed:
            if self._is_closing:
                raise Unavailable("the service is stopping")
            self._joining.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the step under way; jobs that are not done fail as Unavailable."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        live: list[_Live] = []
        while True:
            with self._changed:
                while not (self._is_closing or self._joining or live):
                    self._changed.wait()
                joining, self._joining = self._joining, []
                is_closing = self._is_closing
            if is_closing:
                for job in (*joining, *(each.job for each in live)):
                    job.fail(Unavailable("the service is stopping"))
                return
            for job in joining:
                live += self._begin(job)
            for batch in self._batches(live):
                self._step(batch)
            live = [each for each in live if not each.trajectory.done and not each.job.is_over()]

    def _begin(self, job: _Job) -> list[_Live]:
        if job.is_over():
            return []
        try:
            conditions = self._conditions(job)
            return [
                _Live(job=job, picture=i, trajectory=begin(plan, condition))
                for i, (plan, condition) in enumerate(zip(job.plans, conditions, strict=True))
            ]
        except Exception as error:  # whatever it is, it ends this job and not the thread
            log.exception("stage %d: a trajectory could not begin", self.spec.size)
            job.fail(error)
            return []

    @torch.inference_mode()
    def _conditions(self, job: _Job) -> list[Condition]:
        """One condition for each plan; text and neighbors are encoded once and shared."""
        inputs, unet = job.inputs, self._unet
        pictures = np.moveaxis(to_unit(inputs.neighbors), -1, 1)
        given = [
            noised_low_res(plan, torch.from_numpy(low_res).to(unet.device))
            for plan, low_res in zip(job.plans, inputs.low_res if inputs.low_res is not None else (), strict=False)
        ]
        low_res = [(picture.to(unet.dtype), level) for picture, level in given]
        num_neighbors = len(inputs.neighbors)
        condition = unet.condition(
            text=self._floats(inputs.text)[None],
            text_mask=self._masks(inputs.text_mask)[None],
            neighbors=self._floats(pictures)[None],
            neighbor_text=self._floats(inputs.neighbor_text)[None],
            neighbor_text_mask=self._masks(inputs.neighbor_text_mask)[None],
            neighbor_mask=torch.ones(1, num_neighbors, dtype=torch.bool, device=unet.device),
            low_res=low_res[0][0] if low_res else None,
            augmentation=low_res[0][1] if low_res else None,
        )
        if not low_res:
            return [condition] * len(job.plans)
        return [replace(condition, low_res=picture, augmentation=level) for picture, level in low_res]

    def _floats(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._unet.device, self._unet.dtype)

    def _masks(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._unet.device)

    def _batches(self, live: list[_Live]) -> Iterator[list[_Live]]:
        """What goes through the network together: a set without neighbors cannot be padded to one with some."""
        for has_neighbors in (True, False):
            alike = [e for e in live if (e.trajectory.condition.neighbor_mask.shape[1] > 0) == has_neighbors]
            for first in range(0, len(alike), self._max_batch):
                yield alike[first : first + self._max_batch]

    def _step(self, batch: list[_Live]) -> None:
        batch = [each for each in batch if not each.job.is_over()]
        if not batch:
            return
        started = time.perf_counter()
        try:
            step_together(self._unet, self.spec.prediction, [each.trajectory for each in batch])
        except Exception as error:  # e.g. the device is out of memory: these jobs end, the thread goes on
            log.exception("stage %d: a step of %d trajectories failed", self.spec.size, len(batch))
            for each in batch:
                each.job.fail(error)
            return
        self._on_batch(len(batch), time.perf_counter() - started)
        for each in batch:
            try:
                self._tell(each)
            except Exception as error:  # what one order does with its steps is no other's concern
                log.exception("stage %d: telling a step failed", self.spec.size)
                each.job.fail(error)

    def _tell(self, each: _Live) -> None:
        trajectory = each.trajectory
        each.job.on_step(each.picture, trajectory.step, trajectory.x0)
        if trajectory.done:
            x0 = trajectory.x_t.clamp(-1.0, 1.0).cpu().numpy()
            if not np.isfinite(x0).all():
                raise FloatingPointError(f"stage {self.spec.size} made values that are not finite")
            each.job.finish(each.picture, x0)


def live_bytes(
    unet: UNetConfig, size: int, *, num_pictures: int, num_tokens: int, num_neighbors: int, element_bytes: int
) -> int:
    """Bytes that one order keeps while it lives in a stage: its condition, and x_t and x0 of each picture.

    What a pass of the network takes on top is bounded by the runtime's batch, not by this.
    """
    keys_values = 0
    for level, width in enumerate(unet.widths):
        grid = (size // (unet.patch * 2**level)) ** 2
        if unet.attention[level] and unet.text_width:
            keys_values += 2 * unet.blocks[level] * 2 * num_tokens * width  # DStack and UStack; keys and values
        if unet.neighbor_attention[level]:
            keys_values += 2 * num_neighbors * grid * width
    low_res = 3 * (size // unet.scale) ** 2 if unet.scale > 1 else 0
    states = 2 * 3 * size**2 * torch.float32.itemsize
    pictures = 3 * size**2 * num_neighbors if unet.placement else 0
    shared = (keys_values + unet.embedding_width + PLACEMENT_SIZE + pictures) * element_bytes
    return shared + num_pictures * (states + low_res * element_bytes)
