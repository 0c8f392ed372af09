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
from itertools import pairwise

import numpy as np

from common.diffusion.guidance import coefficients
from common.diffusion.plan import Plan

_NEWEST = 0.2  # weight of the newest sample in a running mean


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
    # The branches' real draws belong to the trajectory; evenly spread ones have the same share of text steps.
    draws = np.arange(plan.steps) / plan.steps
    passes = np.count_nonzero(coefficients(plan.guidance, draws)) / plan.steps
    return StageWork(stage=plan.stage, steps=plan.steps, rows=float(passes) * num_pictures)


@dataclass(kw_only=True)
class _Point:
    rows: float
    seconds: float
    is_guess: bool


class StepCurve:
    """Seconds of one step by the rows that share it: running means at powers of two, straight lines between."""

    def __init__(self) -> None:
        self._points: dict[int, _Point] = {}

    def learn(self, rows: float, seconds: float, *, is_guess: bool = False) -> None:
        """Take a sample in; a guess counts until the first measurement beside it."""
        bucket = round(math.log2(max(rows, 1.0)))
        known = self._points.get(bucket)
        if known is None or (known.is_guess and not is_guess):
            self._points[bucket] = _Point(rows=rows, seconds=seconds, is_guess=is_guess)
        else:
            known.rows += _NEWEST * (rows - known.rows)
            known.seconds += _NEWEST * (seconds - known.seconds)

    def seconds(self, rows: float) -> float:
        """Of one step that `rows` rows share; 0 where nothing is known."""
        points = self._rising()
        if not points or rows <= 0.0:
            return 0.0
        if rows <= points[0].rows:
            return points[0].seconds * rows / points[0].rows  # fewer rows never take longer, and may take this
        for below, above in pairwise(points):
            if rows <= above.rows:
                share = (rows - below.rows) / (above.rows - below.rows)
                return below.seconds + share * (above.seconds - below.seconds)
        last = points[-1]
        if len(points) == 1:
            return last.seconds * rows / last.rows
        slope = (last.seconds - points[-2].seconds) / (last.rows - points[-2].rows)
        return last.seconds + (rows - last.rows) * min(slope, last.seconds / last.rows)

    def row_s(self) -> float:
        """Seconds that one row costs where as many share a step as pays best; 0 where nothing is known."""
        return min((point.seconds / point.rows for point in self._points.values()), default=0.0)

    def _rising(self) -> list[_Point]:
        """The points by rows; one that says fewer seconds than a smaller one is noise, and is passed over."""
        rising: list[_Point] = []
        for point in sorted(self._points.values(), key=lambda point: point.rows):
            if not rising or (point.rows > rising[-1].rows and point.seconds >= rising[-1].seconds):
                rising.append(point)
        return rising


class Visit:
    """One order in one stage, from its entry to its leaving."""

    def __init__(self, work: StageWork) -> None:
        self.work = work
        self.steps_done = 0


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
        for stage, seconds in (guesses or {}).items():
            self.guess(stage, seconds)

    def guess(self, stage: int, row_s: float) -> None:
        """Seconds of one row's pass, until it is measured."""
        self._curve(stage).learn(1.0, row_s, is_guess=True)

    @contextmanager
    def visit(self, work: StageWork) -> Iterator[Visit]:
        """The time that an order is in a stage; the block counts its visit's `steps_done`.

        One that is broken off teaches as well, where it has done a step.
        """
        visit = Visit(work)
        entered_s, area = self._change(work.stage, work.rows)
        try:
            yield visit
        finally:
            left_s, area_then = self._change(work.stage, -work.rows)
            elapsed_s = left_s - entered_s
            if visit.steps_done and elapsed_s > 0:
                mean_rows = (area_then - area) / elapsed_s
                self._curve(work.stage).learn(mean_rows, elapsed_s / visit.steps_done)
                self.samples += 1

    def learn_beside(self, seconds: float) -> None:
        """Take in what an order took beside its stages: retrieval, text encoding, PNG."""
        self._beside_s = seconds if not self._beside_s else self._beside_s + _NEWEST * (seconds - self._beside_s)

    @property
    def beside_s(self) -> float:
        """Seconds that an order takes beside its stages."""
        return self._beside_s

    def step_s(self, stage: int, rows: float) -> float:
        """Seconds of one step of a stage that `rows` rows share; 0 where nothing is known."""
        return self._curve(stage).seconds(rows)

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
