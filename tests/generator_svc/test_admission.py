"""Who is drawn, who waits, who is refused: a state machine beside a plain model, and what callers are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from common.service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from generator_svc.admission import Admission, AdmissionLimits, Ticket
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.call import Call
from generator_svc.estimates import StageTimes, StageWork
from generator_svc.waiting_line import Priority

LIMITS = AdmissionLimits(slots=2, max_waiting=4, max_waiting_s=30.0, aging_s=10.0, least_time=0.8)


def work(seconds: int, stage: int = 64) -> tuple[StageWork, ...]:
    """Work of so many seconds where a row takes one."""
    return (StageWork(stage=stage, steps=seconds, rows=1.0),)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Desk:
    """An admission on a clock of its own, and its figures."""

    def __init__(self, limits: AdmissionLimits = LIMITS) -> None:
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.times = StageTimes({64: 1.0}, now=self.clock)
        self.admission = Admission(limits, self.times, AdmissionMetrics(self.registry), now=self.clock)

    def take(self, seconds: int = 1, priority: Priority = Priority.NORMAL, *, within_s: float | None = None) -> Ticket:
        """A ticket for so much work."""
        until_s = None if within_s is None else self.clock.now_s + within_s
        remaining = (lambda: None) if until_s is None else (lambda: until_s - self.clock.now_s)
        return self.admission.take(work(seconds), priority, Call(time_remaining_s=remaining))

    def figure(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        value = self.registry.get_sample_value(f"reimagen_generator_{name}", labels)
        assert value is not None, name
        return value


@dataclass(kw_only=True, eq=False)
class Modeled:
    """What the model knows of a ticket."""

    ticket: Ticket
    number: int
    priority: Priority
    arrived_s: float
    seconds: int
    until_s: float | None
    starts: int = 0


class AdmissionMachine(RuleBasedStateMachine):
    """Every order is somewhere, once; the next one is the right one; bounds hold; nobody waits while a slot is free."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.waiting: list[Modeled] = []
        self.running: list[Modeled] = []
        self.gone: list[Modeled] = []
        self.is_draining = False
        self.count = 0

    def level(self, each: Modeled) -> int:
        aged = int((self.desk.clock.now_s - each.arrived_s) / LIMITS.aging_s)
        return min(3, int(each.priority) + aged)

    def in_order(self) -> list[Modeled]:
        return sorted(self.waiting, key=lambda each: (-self.level(each), each.number))

    def fill(self) -> None:
        while self.waiting and len(self.running) < LIMITS.slots:
            first = self.in_order()[0]
            self.waiting.remove(first)
            first.starts += 1
            self.running.append(first)

    @rule(
        seconds=st.integers(1, 12),
        priority=st.sampled_from(Priority),
        within_s=st.one_of(st.none(), st.floats(-1.0, 60.0)),
    )
    def comes(self, seconds: int, priority: Priority, within_s: float | None) -> None:
        ahead = [each for each in self.in_order() if self.level(each) >= priority]
        ahead_s = sum(each.seconds for each in ahead)
        must_wait = len(self.running) == LIMITS.slots
        is_full = len(ahead) >= LIMITS.max_waiting or (bool(ahead) and ahead_s + seconds > LIMITS.max_waiting_s)
        try:
            ticket = self.desk.take(seconds, priority, within_s=within_s)
        except (ResourceExhausted, Unavailable) as error:
            reason, retry_after_s = error.reason, error.retry_after_s
            assert must_wait and retry_after_s is not None and 0.1 <= retry_after_s <= 60
            assert self.is_draining if reason == "DRAINING" else is_full
            return
        except DeadlineExceeded:
            everything_s = seconds + ahead_s + sum(each.seconds for each in self.running)
            assert within_s is not None and within_s < everything_s, "it would have been met with certainty"
            return
        assert not (must_wait and (is_full or self.is_draining))
        until_s = None if within_s is None else self.desk.clock.now_s + within_s
        self.count += 1
        self.waiting.append(
            Modeled(
                ticket=ticket,
                number=self.count,
                priority=priority,
                arrived_s=self.desk.clock.now_s,
                seconds=seconds,
                until_s=until_s,
            )
        )
        self.fill()

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def ends(self, which: int) -> None:
        each = self.running.pop(which % len(self.running))
        each.ticket.__exit__(None, None, None)
        self.gone.append(each)
        self.fill()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def goes_away(self, which: int) -> None:
        each = self.waiting.pop(which % len(self.waiting))
        self.desk.admission.leave(each.ticket)
        self.gone.append(each)

    @precondition(lambda self: self.gone)
    @rule(which=st.integers(0, 100))
    def leaves_again(self, which: int) -> None:
        self.desk.admission.leave(self.gone[which % len(self.gone)].ticket)

    @rule(seconds=st.floats(0.1, 15.0))
    def time_passes(self, seconds: float) -> None:
        self.desk.clock.now_s += seconds
        for each in list(self.waiting):
            self.desk.admission.check_deadline(each.ticket)
            late = each.until_s is not None and each.until_s - self.desk.clock.now_s <= 0.8 * each.seconds + 1e-9
            if each.ticket.refusal is not None:
                assert late and isinstance(each.ticket.refusal, DeadlineExceeded)
                self.waiting.remove(each)
                self.gone.append(each)
            else:
                assert each.until_s is None or each.until_s - self.desk.clock.now_s > 0.8 * each.seconds - 1e-9

    @rule()
    def drains(self) -> None:
        self.desk.admission.drain()
        self.is_draining = True
        for each in self.waiting:
            assert isinstance(each.ticket.refusal, Unavailable)
        self.gone += self.waiting
        self.waiting = []

    @invariant()
    def everybody_is_somewhere_once(self) -> None:
        states = {"WAITING": self.waiting, "RUNNING": self.running, "GONE": self.gone}
        for name, members in states.items():
            assert all(each.ticket.state.name == name for each in members)
        assert all(each.starts <= 1 for each in self.gone) and all(each.starts == 1 for each in self.running)
        assert self.desk.admission.num_running == len(self.running)
        assert self.desk.admission.num_waiting == len(self.waiting)

    @invariant()
    def slots_are_used_and_bounds_hold(self) -> None:
        assert len(self.running) <= LIMITS.slots
        assert not self.waiting or len(self.running) == LIMITS.slots
        assert len(self.waiting) <= len(Priority) * LIMITS.max_waiting

    @invariant()
    def the_figures_agree(self) -> None:
        for priority in Priority:
            label = priority.name.lower()
            of_it = [each for each in self.waiting if each.priority is priority]
            assert self.desk.figure("queue_depth", priority=label) == len(of_it)
            of_it = [each for each in self.running if each.priority is priority]
            assert self.desk.figure("in_flight_requests", priority=label) == len(of_it)


AdmissionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmissionMachine = AdmissionMachine.TestCase


def test_priorities_go_first_and_positions_say_so() -> None:
    desk = Desk()
    running = [desk.take(), desk.take()]
    low, normal, high = (desk.take(1, priority) for priority in Priority)
    assert [ticket.position for ticket in (*running, low, normal, high)] == [0, 0, 3, 2, 1]
    desk.admission.leave(running[0])
    assert high.state.name == "RUNNING"
    assert [ticket.position for ticket in (low, normal, high)] == [2, 1, 0]


def test_low_is_not_starved() -> None:
    """One HIGH comes with every second, and each takes one: LOW goes after twice the aging time at the latest."""
    desk = Desk(replace(LIMITS, slots=1, max_waiting=1000, max_waiting_s=1e6))
    running = desk.take()
    low = desk.take(1, Priority.LOW)
    line = [desk.take(1, Priority.HIGH) for _ in range(3)]
    waited = 0
    while low.state.name == "WAITING":
        desk.clock.now_s += 1.0
        waited += 1
        desk.admission.leave(running)
        (running,) = [ticket for ticket in (low, *line) if ticket.state.name == "RUNNING"]
        line = [ticket for ticket in line if ticket is not running] + [desk.take(1, Priority.HIGH)]
        assert waited < 100, "it starves"
    assert 2 * LIMITS.aging_s <= waited <= 2 * LIMITS.aging_s + 5


def test_low_cannot_fill_the_line_for_high() -> None:
    desk = Desk()
    for _ in range(2 + LIMITS.max_waiting):
        desk.take(1, Priority.LOW)
    with pytest.raises(ResourceExhausted):
        desk.take(1, Priority.LOW)
    assert desk.take(1, Priority.HIGH).position == 1
    assert desk.figure("refused_total", reason="queue_full") == 1


def test_an_order_that_is_larger_than_the_bound_may_wait_alone() -> None:
    desk = Desk()
    for _ in range(2):
        desk.take()
    assert desk.take(1000).position == 1
    with pytest.raises(ResourceExhausted) as caught:
        desk.take(1)
    assert caught.value.retry_after_s == 60.0, "no longer than a minute, however much waits"


def test_the_retry_time_follows_the_backlog() -> None:
    desk = Desk()
    for seconds in (1, 1, 10, 10):
        desk.take(seconds)
    with pytest.raises(ResourceExhausted, match="2 orders are drawn and 2 wait, 20 s of work") as caught:
        desk.take(15)
    assert caught.value.retry_after_s == pytest.approx(10 + 10 + 15 - LIMITS.max_waiting_s)


@pytest.mark.parametrize(("seconds_left", "is_met"), [(7.9, False), (8.1, True)])
def test_a_deadline_that_cannot_be_met_is_refused_at_once(seconds_left: float, is_met: bool) -> None:
    """Alone it takes 10 s, and eight tenths of that are believed in."""
    desk = Desk()
    if is_met:
        assert desk.take(10, within_s=seconds_left).state.name == "RUNNING"
        return
    with pytest.raises(DeadlineExceeded, match=r"7\.9 s are left .* done in about 10 s") as caught:
        desk.take(10, within_s=seconds_left)
    assert caught.value.reason == "DEADLINE_TOO_SHORT"
    assert desk.figure("refused_total", reason="deadline_too_short") == 1


def test_the_wait_counts_as_well() -> None:
    """Two of 10 s share the stage until 20; then 4 s alone."""
    desk = Desk()
    desk.take(10)
    desk.take(10)
    with pytest.raises(DeadlineExceeded, match=r"done in about 24 s, 20 s of them waiting behind 0 orders"):
        desk.take(4, within_s=19.0)
    assert desk.take(4, within_s=19.3).position == 1


def test_an_estimate_that_refuses_everybody_is_put_to_the_test() -> None:
    desk = Desk()
    outcomes = []
    for _ in range(33):
        try:
            desk.admission.leave(desk.take(10, within_s=1.0))
            outcomes.append(True)
        except DeadlineExceeded:
            outcomes.append(False)
    assert [i for i, is_let_in in enumerate(outcomes, 1) if is_let_in] == [16, 32]


def test_nothing_known_refuses_nothing() -> None:
    desk = Desk()
    call = Call(time_remaining_s=lambda: 0.01)
    assert desk.admission.take(work(1000, stage=1024), Priority.NORMAL, call).state.name == "RUNNING"


def test_the_decision_takes_under_ten_milliseconds_behind_a_full_line() -> None:
    """The slowest decision there is: a forecast over 200 orders of three stages each."""
    desk = Desk(replace(LIMITS, slots=8, max_waiting=200, max_waiting_s=1e9))
    for stage in (256, 1024):
        desk.times.guess(stage, 1.0)
    three = tuple(StageWork(stage=stage, steps=8, rows=3.0) for stage in (64, 256, 1024))
    for _ in range(207):
        desk.admission.take(three, Priority.NORMAL, Call())
    took_s = []
    for _ in range(5):
        started = time.perf_counter()
        with pytest.raises(DeadlineExceeded):
            desk.admission.take(three, Priority.NORMAL, Call(time_remaining_s=lambda: 1.0))
        took_s.append(time.perf_counter() - started)
    assert min(took_s) < 0.010


async def hear(ticket: Ticket) -> list[int]:
    """All positions that a ticket is told."""
    return [position async for position in ticket.positions()]


def test_who_waits_hears_every_place() -> None:
    async def scene() -> None:
        desk = Desk()
        running = [desk.take(), desk.take()]
        third, fourth = desk.take(), desk.take()
        heard = asyncio.create_task(hear(fourth))
        for leaving in (running[0], running[1]):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            desk.admission.leave(leaving)
        assert await asyncio.wait_for(heard, 5) == [1]
        assert third.state.name == fourth.state.name == "RUNNING"
        assert await hear(running[0]) == []

    asyncio.run(scene())


def real_time_desk(**changes: Any) -> Admission:
    """An admission on the real clock, whose one slot is taken."""
    admission = Admission(
        replace(LIMITS, slots=1, **changes), StageTimes({64: 1e-3}), AdmissionMetrics(CollectorRegistry())
    )
    admission.take(work(1), Priority.NORMAL, Call())
    return admission


def test_a_deadline_that_passes_in_the_line_ends_the_wait() -> None:
    async def scene() -> None:
        admission = real_time_desk()
        until_s = time.monotonic() + 0.15
        ticket = admission.take(work(1), Priority.NORMAL, Call(time_remaining_s=lambda: until_s - time.monotonic()))
        with pytest.raises(DeadlineExceeded), ticket:
            await asyncio.wait_for(hear(ticket), 5)
        assert admission.num_waiting == 0
        assert time.monotonic() < until_s + 1.0

    asyncio.run(scene())


def test_a_deadline_that_is_put_off_is_waited_for() -> None:
    """A caller with more time has joined: what the ticket was told first no longer counts."""

    async def scene() -> None:
        admission = real_time_desk()
        until_s = [time.monotonic() + 0.1]
        ticket = admission.take(work(1), Priority.NORMAL, Call(time_remaining_s=lambda: until_s[0] - time.monotonic()))
        heard = asyncio.create_task(hear(ticket))
        until_s[0] += 60.0
        await asyncio.sleep(0.2)
        assert not heard.done() and admission.num_waiting == 1
        heard.cancel()

    asyncio.run(scene())


@pytest.mark.parametrize("how", ["cancelled", "drained"])
def test_whoever_goes_while_waiting_leaves_the_line(how: str) -> None:
    async def scene() -> None:
        admission = real_time_desk()
        ticket = admission.take(work(1), Priority.NORMAL, Call())

        async def wait() -> None:
            with ticket:
                await hear(ticket)

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        expected: type[BaseException] = asyncio.CancelledError
        if how == "cancelled":
            waiting.cancel()
        else:
            admission.drain()
            expected = Unavailable
        with pytest.raises(expected):
            await waiting
        assert admission.num_waiting == 0 and admission.num_running == 1

    asyncio.run(scene())


def test_what_is_under_way_shortens_the_forecast() -> None:
    """Of 10 steps, 8 are done: 2 s are left to wait for, not 10."""
    desk = Desk(replace(LIMITS, slots=1))
    running = desk.take(10)
    with running.visit(64) as visit:
        visit.steps_done = 8
        with pytest.raises(DeadlineExceeded, match=r"about 3 s, 2 s of them waiting"):
            desk.take(1, within_s=2.0)
        desk.clock.now_s += 16.0
    assert running.course().works == ()


def test_the_settings_matter() -> None:
    """Each limit, changed alone, changes who gets in."""

    def got_in(limits: AdmissionLimits) -> list[str]:
        desk, states = Desk(limits), []
        takes: list[Callable[[], Ticket]] = [
            lambda: desk.take(5),
            lambda: desk.take(5),
            lambda: desk.take(5, Priority.LOW),
            lambda: desk.take(20, Priority.LOW),
            lambda: desk.take(5),
            lambda: desk.take(5, within_s=24.0),
        ]
        for take in takes:
            try:
                states.append(take().state.name)
            except (DeadlineExceeded, ResourceExhausted) as error:
                states.append(error.reason)
            desk.clock.now_s += 3.0
        return states

    base = got_in(LIMITS)
    changed = {"slots": 3, "max_waiting": 1, "max_waiting_s": 20.0, "aging_s": 2.0, "least_time": 2.0}
    for name, value in changed.items():
        assert got_in(replace(LIMITS, **{name: value})) != base, name
