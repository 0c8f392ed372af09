"""One stage's U-Net and the trajectories that live beside it: what a round does, without threads or transport.

A round lets every live trajectory take one step, in batches of at most `max_batch`. Who calls rounds, and when, is the
affair of `stage_runtime.py` (in this process) and `stage_sequences.py` (in Triton).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from common.diffusion.plan import Plan
from common.images import to_unit
from common.stages import StageSpec
from common.trajectories import Trajectory, begin, encode_apart, noised_low_res, step_together, under_text
from common.unet.condition import Condition, Newcomers
from common.unet.unet import UNet
from generator_svc.live_bytes import LiveBytes, live_bytes
from generator_svc.stage_checks import check_inputs
from generator_svc.stage_inputs import StageInputs

WARM_NEIGHBORS = 2
WARM_TOKENS = 16
PROVEN_S = 10.0
CHEAP_S = 0.05  # of PROVEN_S: half a percent

OnBatch = Callable[[int, float], object]
"""(trajectories, seconds) of one batch, for metrics."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that a picture took; `x0` is the estimate after it, float32 [3, S, S] on the stage's device."""

    picture: int
    step: int
    x0: Tensor


@dataclass(kw_only=True, eq=False)
class Job:
    """One order's pictures in a stage.

    Attributes:
        trajectories: one for each picture, in order; none once the job is over.
        moved: steps taken since whoever listens last looked.
        pictures: the result, float32 in [-1, 1] [P, 3, S, S], once all are done.
        error: what ended the job instead.
    """

    trajectories: list[Trajectory]
    moved: list[Step] = field(default_factory=list)
    pictures: np.ndarray | None = None
    error: Exception | None = None
    finished: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.pictures is not None or self.error is not None

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that each picture has done."""
        return tuple(trajectory.step for trajectory in self.trajectories)

    def fail(self, error: Exception) -> None:
        """End the job, and let go of what it keeps."""
        if not self.is_over:
            self.error = error
            self.trajectories, self.finished = [], {}

    def take_moved(self) -> list[Step]:
        """The steps since the last call."""
        moved, self.moved = self.moved, []
        return moved


class StageEngine:
    """Begins jobs and moves them. For one thread at a time, but for `room`.

    Attributes:
        single_s: the least seconds that a trajectory's part of a pass has taken since the stage was warm; infinite before.
    """

    def __init__(
        self,
        spec: StageSpec,
        unet: UNet,
        *,
        max_batch: int,
        max_live_bytes: int,
        on_batch: OnBatch = lambda trajectories, seconds: None,
        encodes_in_steps: bool = True,
    ) -> None:
        """Make an engine.

        Args:
            spec: the stage.
            unet: its network, in evaluation mode, or what stands before it (`compiled_unet.py`).
            max_batch: trajectories that share one pass of the network.
            max_live_bytes: bound on what all admitted orders keep in memory, see `live_bytes`.
            on_batch: told about every batch.
            encodes_in_steps: an order's neighbors are encoded beside the rows of its first step, not by a pass of their
                own; not for a network that stands behind a compiler.
        """
        self.spec = spec
        self.config = unet.config
        self.room = LiveBytes(max_live_bytes, stage=spec.size)
        self.max_batch = max_batch
        self.single_s = float("inf")
        self._passed_at = float("-inf")
        self._unet = unet
        self._on_batch = on_batch
        self._encodes_in_steps = encodes_in_steps and unet.config.uses_neighbors

    @property
    def full_pass_s(self) -> float:
        """Seconds that a pass of `max_batch` trajectories takes, where nothing disturbs it."""
        return self.single_s * self.max_batch

    def needed_bytes(self, *, num_pictures: int, num_tokens: int, num_neighbors: int) -> int:
        """Bytes that an order keeps here while it lives."""
        return live_bytes(
            self.config,
            self.spec.size,
            num_pictures=num_pictures,
            num_tokens=num_tokens,
            num_neighbors=num_neighbors,
            element_bytes=self._unet.dtype.itemsize,
        )

    def begin(self, plans: Sequence[Plan], inputs: StageInputs) -> Job:
        """A job whose trajectories stand before their first step; text and neighbors are encoded once and shared.

        Raises:
            InvalidArgument: the inputs are not what the network reads.
        """
        check_inputs(self.config, self.spec.size, plans, inputs)
        starts = inputs.start if inputs.start is not None else [None]
        neighbors = self._neighbors(inputs)
        conditions = self._conditions(plans, inputs, neighbors)
        later = neighbors if self._encodes_in_steps and neighbors.num_pictures else None
        trajectories = [
            begin(plan, condition, negative=negative, newcomers=later, start=starts[i % len(starts)])
            for i, (plan, (condition, negative)) in enumerate(zip(plans, conditions, strict=True))
        ]
        return Job(trajectories=trajectories)

    def advance(
        self,
        jobs: Sequence[Job],
        *,
        is_over: Callable[[Job], bool] = lambda job: job.is_over,
        after_batch: Callable[[], object] = lambda: None,
    ) -> None:
        """One step of every trajectory of these jobs.

        Whatever goes wrong ends the jobs that it went wrong for: nothing is raised.

        Args:
            is_over: asked before each batch; what is over takes no step.
            after_batch: called after each, when `moved`, `pictures` and `error` say what came of it.
        """
        live = [
            (job, i, trajectory)
            for job in jobs
            for i, trajectory in enumerate(job.trajectories)
            if not job.is_over and not trajectory.done
        ]
        for batch in self._batches(live):
            batch = [each for each in batch if not is_over(each[0])]
            if batch:
                self._step(batch)
                after_batch()

    def warm_up(self, batches: Sequence[int]) -> None:
        """Run a pass of every batch size, with and without neighbors: what is slow once happens before anyone waits.

        Raises:
            ValueError: a pass gave numbers that are not finite.
        """
        for num_neighbors in {WARM_NEIGHBORS if self.config.uses_neighbors else 0, 0}:
            inputs = _warm_inputs(self.spec, self.config.text_width, num_neighbors)
            for count in batches:
                jobs = [self.begin([replace(self.spec.plan(0), steps=1)], inputs) for _ in range(count)]
                for batch in self._batches([(job, 0, job.trajectories[0]) for job in jobs]):
                    step_together(self._unet, self.spec.prediction, [trajectory for _, _, trajectory in batch])
                if not all(torch.isfinite(job.trajectories[0].x_t).all() for job in jobs):
                    raise ValueError(f"stage {self.spec.size}: a pass of {count} trajectories is not finite")
        self._pass_alone()

    def prove(self) -> None:
        """Run the network once, where no pass has ended well for PROVEN_S and a pass costs next to nothing.

        Raises:
            Exception: whatever a pass raises, e.g. on a device that is lost.
            ValueError: it gave numbers that are not finite.
        """
        if self.single_s <= CHEAP_S and time.monotonic() - self._passed_at > PROVEN_S:
            self._pass_alone()

    def _pass_alone(self) -> None:
        started = time.perf_counter()
        num_neighbors = WARM_NEIGHBORS if self.config.uses_neighbors else 0
        job = self.begin(
            [replace(self.spec.plan(0), steps=1)], _warm_inputs(self.spec, self.config.text_width, num_neighbors)
        )
        step_together(self._unet, self.spec.prediction, job.trajectories)
        if not torch.isfinite(job.trajectories[0].x_t).all():  # which waits for the device, too
            raise ValueError(f"stage {self.spec.size}: a pass is not finite")
        self._note_pass(1, time.perf_counter() - started)

    def _note_pass(self, trajectories: int, seconds: float) -> None:
        self._passed_at = time.monotonic()
        self.single_s = min(self.single_s, seconds / trajectories)

    def _batches(self, live: list[tuple[Job, int, Trajectory]]) -> Iterator[list[tuple[Job, int, Trajectory]]]:
        """What goes through the network together: a set without neighbors cannot be padded to one with some."""
        for has_neighbors in (True, False):
            alike = [each for each in live if (each[2].condition.neighbor_mask.shape[1] > 0) == has_neighbors]
            for first in range(0, len(alike), self.max_batch):
                yield alike[first : first + self.max_batch]

    def _step(self, batch: list[tuple[Job, int, Trajectory]]) -> None:
        if self._is_settled(batch):
            return
        # With neighbors in it a pass is larger, and they are one order's: whoever brings what cannot be encoded ends alone.
        rest = [each for each in batch if self._encodes_apart(each[0], each[2])]
        if rest:
            self._is_settled(rest)

    def _is_settled(self, batch: list[tuple[Job, int, Trajectory]]) -> bool:
        """Step these trajectories together, or end their jobs; False: nothing is done, and neighbors may be why."""
        started = time.perf_counter()
        try:
            step_together(self._unet, self.spec.prediction, [trajectory for _, _, trajectory in batch])
        except Exception as error:  # e.g. the device is out of memory: these jobs end, the others go on
            log.exception("stage %d: a step of %d trajectories failed", self.spec.size, len(batch))
            if any(trajectory.newcomers is not None for _, _, trajectory in batch):
                return False  # not from here on: the error keeps what the pass has taken
            for job, _, _ in batch:
                job.fail(error)
            return True
        seconds = time.perf_counter() - started
        self._note_pass(len(batch), seconds)
        self._on_batch(len(batch), seconds)
        for job, picture, trajectory in batch:
            job.moved.append(Step(picture=picture, step=trajectory.step, x0=trajectory.x0))
            if trajectory.done and not job.is_over:
                self._finish(job, picture, trajectory)
        return True

    def _encodes_apart(self, job: Job, trajectory: Trajectory) -> bool:
        """Whether its neighbors are encoded now, if need be in a pass of their own; else the job has ended."""
        try:
            if not job.is_over:
                encode_apart(self._unet, trajectory)
        except Exception as error:
            log.exception("stage %d: an order's neighbors could not be encoded", self.spec.size)
            job.fail(error)
        return not job.is_over

    def _finish(self, job: Job, picture: int, trajectory: Trajectory) -> None:
        x0 = trajectory.x_t.clamp(-1.0, 1.0).cpu().numpy()
        if not np.isfinite(x0).all():
            job.fail(FloatingPointError(f"stage {self.spec.size} made values that are not finite"))
            return
        job.finished[picture] = x0
        if len(job.finished) == len(job.trajectories):
            job.pictures = np.stack([job.finished[i] for i in range(len(job.trajectories))])

    @torch.inference_mode()
    def _conditions(
        self, plans: Sequence[Plan], inputs: StageInputs, neighbors: Newcomers
    ) -> list[tuple[Condition, Condition | None]]:
        """The condition of each plan, and the same under the negative text."""
        unet = self._unet
        given = [
            noised_low_res(plan, torch.from_numpy(np.ascontiguousarray(low_res)).to(unet.device))
            for plan, low_res in zip(plans, inputs.low_res if inputs.low_res is not None else (), strict=False)
        ]
        low_res = [(picture.to(unet.dtype), level) for picture, level in given]
        condition = unet.condition(
            text=self._floats(inputs.text)[None],
            text_mask=self._masks(inputs.text_mask)[None],
            neighbors=neighbors.pictures,
            neighbor_text=neighbors.text,
            neighbor_text_mask=neighbors.text_mask,
            neighbor_mask=torch.ones(1, len(inputs.neighbors), dtype=torch.bool, device=unet.device),
            low_res=low_res[0][0] if low_res else None,
            augmentation=low_res[0][1] if low_res else None,
            later=self._encodes_in_steps,
        )
        negative = None
        if inputs.negative_text is not None and inputs.negative_text_mask is not None:
            text, mask = self._floats(inputs.negative_text), self._masks(inputs.negative_text_mask)
            negative = under_text(unet, condition, text[None], mask[None])
        if not low_res:
            return [(condition, negative)] * len(plans)
        return [(_with_low_res(condition, *each), negative and _with_low_res(negative, *each)) for each in low_res]

    def _neighbors(self, inputs: StageInputs) -> Newcomers:
        return Newcomers(
            pictures=self._floats(np.moveaxis(to_unit(inputs.neighbors), -1, 1))[None],
            text=self._floats(inputs.neighbor_text)[None],
            text_mask=self._masks(inputs.neighbor_text_mask)[None],
        )

    def _floats(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._unet.device, self._unet.dtype)

    def _masks(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._unet.device)


def _with_low_res(condition: Condition, picture: Tensor, level: Tensor) -> Condition:
    return replace(condition, low_res=picture, augmentation=level)


def _warm_inputs(spec: StageSpec, text_width: int, num_neighbors: int) -> StageInputs:
    tokens = WARM_TOKENS if text_width else 0
    return StageInputs(
        text=np.zeros((tokens, text_width), np.float32),
        text_mask=np.ones(tokens, np.bool_),
        neighbors=np.zeros((num_neighbors, spec.size, spec.size, 3), np.uint8),
        neighbor_text=np.zeros((num_neighbors, tokens, text_width), np.float32),
        neighbor_text_mask=np.ones((num_neighbors, tokens), np.bool_),
        low_res=np.zeros((1, 3, spec.low_res_size, spec.low_res_size), np.float32) if spec.low_res_size else None,
    )
