"""How long a step of each stage takes, learnt from the orders that are drawn.

What is known of a stage is a curve: seconds of one step by the number of network rows that share it (pictures times
guidance passes, of all orders in the stage). On a CPU it is nearly a line through zero, on a GPU nearly flat: both the
time that an order takes alone and what it costs beside others are read off it, and neither needs to know the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from common.diffusion.guidance import Guidance, coefficients
from common.diffusion.plan import Plan

_NEWEST = 0.2  # weight of the newest sample in a running mean
_ENOUGH_SAMPLES = 3  # the first of them pays for what is slow once


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What one order has to do in one stage.

    Attributes:
        stage: side of its pictures.
        steps: of each trajectory; they are taken together.
        rows: network rows of one step: pictures x guidance passes, the mean over the steps.
    """

    stage: int
    steps: int
    rows: float


def stage_work(plan: Plan, num_pictures: int) -> StageWork:
    """The work of a plan."""
    return StageWork(stage=plan.stage, steps=plan.steps, rows=_passes(plan.guidance, plan.steps) * num_pictures)


@lru_cache(maxsize=256)  # most requests ask for the defaults, and who is refused should cost next to nothing
def _passes(guidance: Guidance, steps: int) -> float:
    """Passes of a step, the mean over the steps."""
    # The branches' real draws belong to the trajectory; evenly spread ones have the same share of text steps.
    draws = np.arange(steps) / steps
    return float(np.count_nonzero(coefficients(guidance, draws)) / steps)


@dataclass(kw_only=True)
class _Point:
    rows: float
    seconds: float
    num_samples: int


class StepCurve:
    """Seconds of one step by the rows that share it: points at about powers of two, straight lines between.

    A machine has slow moments, some of them a hundred times as slow: the first samples of a point count by their least,
    and no later one moves the mean by more than it would if it were half or twice the mean.
    """

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}
        self._num_samples = 0
        self._was_guessed = False

    @property
    def is_trusted(self) -> bool:
        """Whether enough is known to refuse a deadline for it."""
        return self._was_guessed or self.is_measured

    @property
    def is_measured(self) -> bool:
        """The same of what was measured, whatever was guessed."""
        return self._num_samples >= _ENOUGH_SAMPLES

    def guess(self, row_s: float) -> None:
        """Seconds of a step of one row; each further row takes as long, until it is measured."""
        self._points[0] = _Point(rows=1.0, seconds=row_s, num_samples=0)
        self._was_guessed = True

    def learn(self, rows: float, seconds: float) -> None:
        """Take a sample in."""
        self._num_samples += 1
        bucket = round(math.log2(max(rows, 1.0)))
        known = self._points.get(bucket)
        if known is None or not known.num_samples:
            self._points[bucket] = _Point(rows=rows, seconds=seconds, num_samples=1)
            return
        known.num_samples += 1
        known.rows += _NEWEST * (rows - known.rows)
        if known.num_samples <= _ENOUGH_SAMPLES:
            known.seconds = min(known.seconds, seconds)
        else:
            known.seconds *= min(2.0, max(0.5, seconds / known.seconds)) ** _NEWEST

    def seconds(self, rows: float) -> float:
        """Of one step that `rows` rows share; 0 where nothing is known."""
        points = self._rising()
        if not points or rows <= 0.0:
            return 0.0
        (first_rows, first_s), (last_rows, last_s) = points[0], points[-1]
        if rows <= first_rows:
            return first_s * rows / first_rows  # fewer rows never take longer, and may take this
        for (below, below_s), (above, above_s) in pairwise(points):
            if rows <= above:
                return below_s + (rows - below) / (above - below) * (above_s - below_s)
        if len(points) > 1:
            below, below_s = points[-2]
            return last_s + (rows - last_rows) * (last_s - below_s) / (last_rows - below)
        is_guess = not any(point.num_samples for point in self._points.values())
        return last_s * rows / last_rows if is_guess else last_s  # what more rows cost is not made up

    def row_s(self) -> float:
        """Seconds that one row costs where as many share a step as pays best; 0 where nothing is known."""
        return min((point.seconds / point.rows for point in self._points.values()), default=0.0)

    def _rising(self) -> list[tuple[float, float]]:
        """(rows, seconds): never more than a step of more rows takes, nor than fewer rows' share makes of it."""
        rising: list[tuple[float, float]] = []
        least_s = math.inf
        for point in sorted(self._points.values(), key=lambda point: point.rows, reverse=True):
            least_s = min(least_s, point.seconds)
            if not rising or point.rows < rising[-1][0]:
                rising.append((point.rows, least_s))
        rising.reverse()
        for i, ((below, below_s), (rows, seconds)) in enumerate(pairwise(rising), 1):
            rising[i] = rows, min(seconds, below_s * rows / below)
        return rising


class Visit:
    """One order in one stage, from its entry to its leaving."""

    def __init__(self, work: StageWork, look: Callable[[], tuple[float, float]]) -> None:
        """`look` gives the time, and the integral over it of the rows in the stage."""
        self.work = work
        self.steps_done = 0
        self._look = look
        self._entered = self._last = look()
        self._first: tuple[float, float] | None = None

    def step(self, steps_done: int) -> None:
        """Told after each step of a picture."""
        if steps_done > self.steps_done:
            self.steps_done, self._last = steps_done, self._look()
            if self._first is None:
                self._first = self._last

    def sample(self) -> tuple[float, float] | None:
        """(mean rows, seconds a step), the first step left out where there are more: texts and neighbors are encoded in it."""
        if self._first is None:
            return None
        steps, (since_s, area) = (self.steps_done - 1, self._first) if self.steps_done > 1 else (1, self._entered)
        elapsed_s = self._last[0] - since_s
        return ((self._last[1] - area) / elapsed_s, elapsed_s / steps) if elapsed_s > 0 else None


class StageTimes:
    """The curves of all stages, and who is in them now. Belongs to one event loop."""

    def __init__(
        self, guesses: Mapping[int, float] | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`guesses`: seconds of one row's pass by stage, until it is measured."""
        self._now = now
        self._curves: dict[int, StepCurve] = {}
        self._rows: dict[int, float] = {}
        self._row_seconds: dict[int, float] = {}  # integral over time of the rows in a stage
        self._changed_s: dict[int, float] = {}
        self._beside_s = 0.0
        self.samples = 0  # measurements taken in, ever
        for stage, row_s in (guesses or {}).items():
            self._curve(stage).guess(row_s)

    @contextmanager
    def visit(self, work: StageWork) -> Iterator[Visit]:
        """The time that an order is in a stage; the block tells the visit of its steps.

        One that is broken off teaches as well, where it has done a step.
        """
        self._change(work.stage, work.rows)
        visit = Visit(work, lambda: self._change(work.stage, 0.0))
        try:
            yield visit
        finally:
            self._change(work.stage, -work.rows)
            if (sample := visit.sample()) is not None:
                self._curve(work.stage).learn(*sample)
                self.samples += 1

    def learn_beside(self, seconds: float) -> None:
        """Take in what an order took beside its stages: retrieval, text encoding, PNG."""
        self._beside_s = seconds if not self._beside_s else self._beside_s + _NEWEST * (seconds - self._beside_s)

    @property
    def beside_s(self) -> float:
        """Seconds that an order takes beside its stages."""
        return self._beside_s

    def knows(self, works: Iterable[StageWork]) -> bool:
        """Whether all of these stages have been measured."""
        return all(self._curve(work.stage).is_measured for work in works)

    def step_s(self, stage: int, rows: float) -> float:
        """Seconds of one step of a stage that `rows` rows share; 0 where too little is known."""
        curve = self._curve(stage)
        return curve.seconds(rows) if curve.is_trusted else 0.0

    def alone_s(self, works: Iterable[StageWork]) -> float:
        """Seconds that an order takes with nobody beside it."""
        return self._beside_s + sum(work.steps * self.step_s(work.stage, work.rows) for work in works)

    def work_s(self, works: Sequence[StageWork]) -> float:
        """What an order costs: the sum over its stages of pictures x steps x guidance passes x seconds a pass."""
        return sum(work.steps * work.rows * self._curve(work.stage).row_s() for work in works)

    def _curve(self, stage: int) -> StepCurve:
        return self._curves.setdefault(stage, StepCurve())

    def _change(self, stage: int, rows: float) -> tuple[float, float]:
        """Let rows in (or out); gives the time, and the integral until now."""
        now = self._now()
        here = self._rows.get(stage, 0.0)
        area = self._row_seconds.get(stage, 0.0) + here * (now - self._changed_s.get(stage, now))
        self._rows[stage], self._row_seconds[stage], self._changed_s[stage] = here + rows, area, now
        return now, area
