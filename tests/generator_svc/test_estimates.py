"""What a step takes, learnt; and what will happen, played forward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.diffusion.guidance import Guidance
from common.stages import stage
from generator_svc.estimates import StageTimes, StageWork, StepCurve, Visit, stage_work
from generator_svc.forecast import Course, forecast

GUIDANCE = stage(64).plan(0).guidance


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (replace(GUIDANCE, strategy="interleaved", text_weight=2.0, neighbor_weight=2.0, eta=0.3), 2.0),
        (replace(GUIDANCE, strategy="weighted", text_weight=2.0, neighbor_weight=6.0, eta=0.3), 3.0),
        (replace(GUIDANCE, strategy="joint", text_weight=2.0), 2.0),
        (replace(GUIDANCE, strategy="joint", text_weight=1.0), 1.0),
        (replace(GUIDANCE, strategy="interleaved", text_weight=1.0, neighbor_weight=2.0, eta=0.25), 1.75),
    ],
)
def test_work_counts_the_passes_that_are_run(guidance: Guidance, rows: float) -> None:
    plan = replace(stage(64).plan(3), steps=8, guidance=guidance)
    assert stage_work(plan, 1) == StageWork(stage=64, steps=8, rows=rows)
    assert stage_work(plan, 4).rows == 4 * rows


@settings(deadline=None)
@given(
    samples=st.lists(st.tuples(st.floats(1.0, 64.0), st.floats(1e-3, 10.0)), min_size=1, max_size=20),
    rows=st.lists(st.floats(0.1, 200.0), min_size=2, max_size=5).map(sorted),
)
def test_more_rows_never_take_less(samples: list[tuple[float, float]], rows: list[float]) -> None:
    curve = StepCurve()
    for sample in samples:
        curve.learn(*sample)
    seconds = [curve.seconds(each) for each in rows]
    assert all(below <= above * (1 + 1e-9) for below, above in pairwise(seconds))
    assert seconds[0] > 0


def test_a_curve_learns_a_cpu_and_a_gpu() -> None:
    for fixed_s, row_s in ((0.0, 0.1), (0.5, 0.001)):
        curve = StepCurve()
        for rows in (1, 2, 4, 8, 16) * 3:
            curve.learn(rows, fixed_s + row_s * rows)
        for rows in (1, 3, 6, 12, 32):
            assert curve.seconds(rows) == pytest.approx(fixed_s + row_s * rows, rel=1e-6)
        assert curve.row_s() == pytest.approx(fixed_s / 16 + row_s)


def test_a_guess_counts_until_it_is_measured() -> None:
    curve = StepCurve()
    assert curve.seconds(3) == 0.0 == curve.row_s() and not curve.is_trusted
    curve.guess(5.0)
    assert curve.seconds(3) == 15.0 and curve.row_s() == 5.0 and curve.is_trusted
    curve.learn(1.0, 0.1)
    assert curve.seconds(1) == 0.1 == curve.row_s() and curve.is_trusted


def test_a_slow_moment_refuses_nobody() -> None:
    curve = StepCurve()
    curve.learn(3.0, 6.0)
    assert curve.seconds(48) == 6.0, "what more rows cost is not known yet, and not made up"
    assert not curve.is_trusted
    curve.learn(3.0, 0.1)
    curve.learn(3.0, 0.11)
    assert curve.is_trusted and curve.seconds(3) == pytest.approx(0.1)
    curve.learn(3.0, 60.0)
    assert curve.seconds(3) < 0.12, "six hundred times as slow, once"
    for _ in range(60):
        curve.learn(3.0, 6.0)
    assert curve.seconds(3) > 5.5, "a machine that has become slow is believed in the end"
    curve.learn(6.0, 0.2)
    assert curve.seconds(3) == pytest.approx(0.2), "fewer rows never take longer than more"
    curve = StepCurve()
    curve.learn(1.0, 0.1)
    curve.learn(8.0, 60.0)
    assert curve.seconds(8) == pytest.approx(0.8), "nor more rows more than their share"


class Clock:
    """A clock that goes when it is told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def take_steps(clock: Clock, seconds: float, *visits: Visit, first: int = 1, count: int) -> None:
    """Let visits take so many steps, each of them so long."""
    for step in range(first, first + count):
        clock.now_s += seconds
        for visit in visits:
            visit.step(step)


def test_orders_that_share_a_stage_teach_what_sharing_costs() -> None:
    """Alone a step takes half a second, and one a second where two share it; encoding takes 10 s, and is no step."""
    clock = Clock()
    times = StageTimes(now=clock)
    work = StageWork(stage=64, steps=10, rows=1.0)
    with times.visit(work) as first:
        clock.now_s += 10.0
        take_steps(clock, 0.5, first, count=10)
    with times.visit(work) as second, times.visit(work) as third:
        assert times.step_s(64, 2.0) == 0.0, "too few to trust"
        clock.now_s += 10.0
        take_steps(clock, 1.0, second, third, count=10)
    assert times.samples == 3
    assert (times.step_s(64, 1.0), times.step_s(64, 2.0)) == (0.5, 1.0)
    assert times.alone_s([work]) == 5.0 and times.work_s([work]) == 5.0


def test_who_comes_in_the_middle_is_counted_for_as_long_as_it_is_there() -> None:
    """Of 8 s between the first step and the last, another was there for 4: 1.5 rows on average."""
    clock = Clock()
    times = StageTimes(now=clock)
    work = StageWork(stage=64, steps=9, rows=1.0)
    with times.visit(work) as visit:
        take_steps(clock, 1.0, visit, count=5)
        with times.visit(work):
            take_steps(clock, 1.0, visit, first=6, count=4)
    assert visit.sample() == (1.5, 1.0)


def test_one_that_is_broken_off_teaches_what_it_did() -> None:
    clock = Clock()
    times = StageTimes({64: 100.0}, now=clock)
    work = StageWork(stage=64, steps=1000, rows=1.0)
    with times.visit(work) as visit:
        take_steps(clock, 2.0, visit, count=3)
    assert times.step_s(64, 1.0) == 2.0
    with times.visit(work):
        clock.now_s += 50.0  # no step was done: nothing is known
    assert times.step_s(64, 1.0) == 2.0
    with times.visit(replace(work, steps=1)) as visit:
        take_steps(clock, 1.0, visit, count=1)
    assert times.step_s(64, 1.0) == 1.0, "one step alone is a sample, if a poor one"
    times.learn_beside(0.5)
    assert times.alone_s([replace(work, steps=10)]) == 10.5
    assert times.work_s([replace(work, steps=10, rows=3.0)]) == 30.0


def ends(
    running: list[Course], waiting: list[list[StageWork]], slots: int, *, fixed_s: float = 0.0
) -> tuple[float, float]:
    """(begins, ends) of the last that waits, where a row takes a second and a step `fixed_s` beside."""
    found = forecast(
        running,
        map(Course.whole, waiting),
        slots=slots,
        step_s=lambda _, rows: fixed_s + (rows if not fixed_s else 0.0),
    )
    return found.begins_s, found.ends_s


def works(*steps: int) -> list[StageWork]:
    """One row in stages 64, 256, ..., of so many steps."""
    return [StageWork(stage=64 * 4**i, steps=n, rows=1.0) for i, n in enumerate(steps)]


def test_forecasts_that_can_be_reckoned_by_hand() -> None:
    assert ends([], [works(10)], 2) == (0, 10)
    assert ends([Course.whole(works(10))], [works(10)], 2) == (0, 20), "they share"
    assert ends([Course.whole(works(10))], [works(10)], 1) == (10, 20), "one after the other"
    assert ends([Course.whole(works(10))], [works(10)], 2, fixed_s=1.0) == (0, 10), "a batch costs no more than one"
    assert ends([Course.whole(works(100))], [works(1)], 2) == (0, 2), "a short one is not held up by a long one"
    assert ends([Course(works=works(10), steps_left=3)], [works(5)], 1) == (3, 8)
    # Side by side: A is in 256 from 5 on, while B is in 64 (5 s shared and 5 s of A's in 256, then B's own 256).
    assert ends([Course.whole(works(5, 5))], [works(5, 5)], 2) == (0, 20)
    assert ends([Course(works=works(5, 5)[1:], steps_left=5)], [works(5, 5)], 2) == (0, 10), "they pipeline"
    assert ends([Course(works=[], steps_left=0)], [works(5)], 1) == (0, 5), (
        "one that packs its pictures is all but done"
    )


course_works = st.lists(st.integers(1, 20), min_size=1, max_size=3).map(lambda steps: works(*steps))


@settings(deadline=None)
@given(running=st.lists(course_works, max_size=3), waiting=st.lists(course_works, min_size=1, max_size=6))
def test_a_forecast_lies_between_what_is_certain(
    running: list[list[StageWork]], waiting: list[list[StageWork]]
) -> None:
    begins_s, ends_s = ends([Course.whole(each) for each in running], waiting, 3)
    alone_s = sum(work.steps for work in waiting[-1])
    everything_s = sum(work.steps for each in (*running, *waiting) for work in each)
    assert begins_s + alone_s <= ends_s + 1e-6
    assert ends_s <= everything_s + 1e-6
    fewer = ends([Course.whole(each) for each in running], waiting[-1:], 3)
    assert fewer[0] <= begins_s + 1e-6, "nobody begins sooner for those before it"
