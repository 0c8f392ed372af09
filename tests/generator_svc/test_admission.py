"""Who is drawn, who waits, who is refused, and what they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from common.service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from generator_svc.admission import Admission, AdmissionLimits, Ticket
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.call import Call
from generator_svc.estimates import StageTimes, StageWork
from generator_svc.waiting_line import Priority
from tests.generator_svc.desk import LIMITS, Desk, work


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


def test_what_has_waited_long_enough_goes_before_whoever_came_later() -> None:
    """Both are as high as can be by then: HIGH does not rise beyond."""
    desk = Desk()
    running = [desk.take(), desk.take()]
    low = desk.take(1, Priority.LOW)
    desk.clock.now_s += 5.0
    high = desk.take(1, Priority.HIGH)
    assert (high.position, low.position) == (1, 2)
    desk.clock.now_s += 20.0
    desk.admission.leave(running[0])
    assert low.state.name == "RUNNING" and high.position == 1


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
    with pytest.raises(DeadlineExceeded, match=r"7\.9 s are left .* done in about 10\.0 s") as caught:
        desk.take(10, within_s=seconds_left)
    assert caught.value.reason == "DEADLINE_TOO_SHORT"
    assert desk.figure("refused_total", reason="deadline_too_short") == 1


def test_the_wait_counts_as_well() -> None:
    """Two of 10 s share the stage until 20; then 4 s are shared with one that comes behind: nothing is assumed to go well."""
    desk = Desk()
    desk.take(10)
    desk.take(10)
    with pytest.raises(DeadlineExceeded, match=r"done in about 28\.0 s, 20\.0 s of them waiting behind 0 orders"):
        desk.take(4, within_s=27.9)
    assert desk.take(4, within_s=28.1).position == 1


def test_a_turn_that_comes_too_late_is_given_to_the_next() -> None:
    """The slot's order took 8 s longer than it was to: who is next would be late by now, the one behind it not."""
    desk = Desk(replace(LIMITS, slots=1))
    running = desk.take(10)
    tight = desk.take(5, within_s=16.0)
    easy = desk.take(5, within_s=60.0)
    desk.clock.now_s += 11.9
    desk.admission.leave(running)
    assert tight.refusal is not None and tight.refusal.reason == "DEADLINE_TOO_SHORT"
    assert easy.state.name == "RUNNING"


def test_the_last_in_line_gets_its_chance() -> None:
    """Nobody waits behind it, so that trying costs nobody anything."""
    desk = Desk(replace(LIMITS, slots=1))
    running = desk.take(10)
    tight = desk.take(5, within_s=16.0)
    desk.clock.now_s += 11.9
    desk.admission.leave(running)
    assert tight.state.name == "RUNNING"


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
    desk.take(10)
    for _ in range(33):
        with pytest.raises(DeadlineExceeded):
            desk.take(10, within_s=1.0)


def test_nothing_known_refuses_nothing() -> None:
    desk = Desk()
    call = Call(time_remaining_s=lambda: 0.01)
    assert desk.admission.take(work(1000, stage=1024), Priority.NORMAL, call).state.name == "RUNNING"


def test_the_decision_takes_under_ten_milliseconds_behind_a_full_line() -> None:
    """The slowest decision there is: a forecast over 200 orders of three stages each."""
    desk = Desk(replace(LIMITS, slots=8, max_waiting=200, max_waiting_s=1e9))
    desk.times = desk.admission.times = StageTimes(dict.fromkeys((64, 256, 1024), 1.0))
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
        visit.step(8)
        with pytest.raises(DeadlineExceeded, match=r"about 3\.0 s, 2\.0 s of them waiting"):
            desk.take(1, within_s=2.0)
        desk.clock.now_s += 16.0
    assert running.course().works == ()


def test_the_settings_matter() -> None:
    """Each limit, changed alone, changes who gets in."""

    def got_in(limits: AdmissionLimits) -> list[str]:
        desk, states = Desk(limits), []
        takes: list[Callable[[], Ticket]] = [
            lambda: desk.take(5, within_s=20.0),
            lambda: desk.take(5),
            lambda: desk.take(5, Priority.LOW),
            lambda: desk.take(20, Priority.LOW),
            lambda: desk.take(5),
            lambda: desk.take(5, within_s=75.0),
        ]
        for take in takes:
            try:
                states.append(take().state.name)
            except (DeadlineExceeded, ResourceExhausted) as error:
                states.append(error.reason)
            desk.clock.now_s += 3.0
        return states

    base = got_in(LIMITS)
    changed = {"slots": 3, "max_waiting": 1, "max_waiting_s": 20.0, "aging_s": 2.0}
    changed |= {"least_time": 9.0, "least_time_crowded": 9.0}
    for name, value in changed.items():
        assert got_in(replace(LIMITS, **{name: value})) != base, name
