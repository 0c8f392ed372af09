"""What will happen to one more order: who runs and who waits is played forward, stage by stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from generator_svc.estimates import StageWork

_NO_STEP = 1e-9

StepSeconds = Callable[[int, float], float]
"""(stage, rows that share a step) -> seconds of the step."""


@dataclass(kw_only=True)
class Course:
    """What is left of one order.

    Attributes:
        works: its stages, the one that it is in first.
        steps_left: of that first one.
    """

    works: Sequence[StageWork]
    steps_left: float

    @classmethod
    def whole(cls, works: Sequence[StageWork]) -> Course:
        """Of an order that has not begun."""
        return cls(works=works, steps_left=works[0].steps if works else 0.0)


@dataclass(kw_only=True)
class _Running:
    works: deque[StageWork]
    steps_left: float
    number: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds from now until an order begins, and until it ends."""

    begins_s: float
    ends_s: float


def forecast(
    running: Iterable[Course], waiting: Iterable[Course], *, slots: int, step_s: StepSeconds, followers: int = 0
) -> Forecast:
    """Of the last one that waits.

    Orders in one stage share its steps, as continuous batching has them; stages run side by side.

    Args:
        running: what is under way.
        waiting: in the order in which they begin; the last one is asked about.
        slots: how many run at once.
        step_s: what a step takes.
        followers: how many like it come behind it, and share with it what others leave. Without them this is early
            rather than late.
    """
    line = deque(enumerate(waiting))
    assert line, "a forecast is of somebody"
    wanted, asked = line[-1]
    line.extend((wanted + 1 + i, asked) for i in range(followers))
    live = [_begin(-1, course) for course in running]
    now_s = begins_s = 0.0
    while True:
        while line and len(live) < slots:
            number, course = line.popleft()
            live.append(_begin(number, course))
            begins_s = now_s if number <= wanted else begins_s
        now_s += _advance(live, step_s)
        if any(each.number == wanted and not each.works for each in live):
            return Forecast(begins_s=begins_s, ends_s=now_s)
        live = [each for each in live if each.works]


def _begin(number: int, course: Course) -> _Running:
    return _Running(works=deque(course.works), steps_left=course.steps_left, number=number)


def _advance(live: Sequence[_Running], step_s: StepSeconds) -> float:
    """Let time pass until somebody leaves a stage; gives the seconds."""
    rows: dict[int, float] = {}
    for each in live:
        if each.works:
            rows[each.works[0].stage] = rows.get(each.works[0].stage, 0.0) + each.works[0].rows
    seconds = {stage: step_s(stage, total) for stage, total in rows.items()}
    passed_s = min((each.steps_left * seconds[each.works[0].stage] for each in live if each.works), default=0.0)
    for each in live:
        if not each.works:
            continue
        one_s = seconds[each.works[0].stage]
        each.steps_left -= passed_s / one_s if one_s > 0.0 else each.steps_left
        if each.steps_left <= _NO_STEP:
            each.works.popleft()
            each.steps_left = each.works[0].steps if each.works else 0.0
    return passed_s
