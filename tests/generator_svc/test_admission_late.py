"""What admission makes of forecasts that turn out short, and of orders that will be late."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.service.errors import DeadlineExceeded
from generator_svc import admission
from generator_svc.admission import Ticket
from generator_svc.admission_margin import Margin
from generator_svc.call import Call
from generator_svc.estimates import StageWork
from generator_svc.waiting_line import Priority
from tests.generator_svc.desk import LIMITS, Desk


def test_nine_of_ten_orders_are_within_the_margin() -> None:
    margin = Margin()
    for _ in range(7):
        margin.learn(10.0, 15.0)
    assert margin.factor == 1.0, "too few to trust"
    margin.learn(0.0, 15.0)
    assert margin.factor == 1.0, "a forecast of nothing says nothing"
    margin.learn(10.0, 15.0)
    assert margin.factor == 1.5
    for ratio in range(40):
        margin.learn(10.0, 10.0 + ratio / 4)
    assert margin.factor == pytest.approx(1.9, abs=0.05)
    for _ in range(48):
        margin.learn(10.0, 5.0)
    assert margin.factor == 1.0, "what was forecast is not promised to take less"
    margin.learn(10.0, 1000.0)
    assert margin.factor == 1.0, "one slow moment"
    for _ in range(8):
        margin.learn(10.0, 1000.0)
    assert margin.factor == 2.0, "and a long one refuses nobody for ever"


def draw(desk: Desk, ticket: Ticket, *, step_s: float = 1.0, beside_s: float = 0.0) -> None:
    """Let an order of one stage have its way, and its pictures be packed."""
    with ticket:
        with ticket.visit(64) as visit:
            for step in range(1, ticket.works[0].steps + 1):
                desk.clock.now_s += step_s
                visit.step(step)
        desk.clock.now_s += beside_s


def test_forecasts_that_were_short_leave_room_while_others_wait() -> None:
    """Orders take twice what their steps do. Alone that is no reason to refuse one; behind others it is."""
    desk = Desk(replace(LIMITS, slots=1))
    for _ in range(12):
        draw(desk, desk.take(10), beside_s=10.0)
    assert desk.figure("forecast_margin_ratio") == pytest.approx(2.0)
    running = desk.take(10)
    with pytest.raises(DeadlineExceeded, match=r"done in about 20\.0 s"):
        desk.take(10, within_s=39.0)
    assert desk.take(10, within_s=41.0).position == 1
    assert running.state.name == "RUNNING"
    empty = Desk(replace(LIMITS, slots=1))
    for _ in range(12):
        draw(empty, empty.take(10), beside_s=10.0)
    assert empty.take(10, within_s=8.5).state.name == "RUNNING"


def test_what_was_only_guessed_or_broken_off_early_teaches_no_margin() -> None:
    desk = Desk(replace(LIMITS, slots=1))
    for _ in range(12):
        with desk.take(10):
            desk.clock.now_s += 1.0  # nothing of it was done
    assert desk.figure("forecast_margin_ratio") == 1.0
    for late_s, margin in ((0.0, 1.0), (14.0, 1.5)):
        for _ in range(12):
            with pytest.raises(TimeoutError):
                break_off(desk, late_s)
        assert desk.figure("forecast_margin_ratio") == pytest.approx(margin), "late already, it would have been later"


def break_off(desk: Desk, late_s: float) -> None:
    """An order of 10 s that ends after its first one and so long."""
    with desk.take(10) as ticket, ticket.visit(64) as visit:
        desk.clock.now_s += 1.0
        visit.step(1)
        desk.clock.now_s += late_s
        raise TimeoutError


TWO = (StageWork(stage=64, steps=10, rows=1.0), StageWork(stage=256, steps=10, rows=1.0))


@pytest.mark.parametrize(
    ("others", "left_s", "goes_on"), [(2, 9.5, True), (2, 8.5, False), (1, 8.5, True), (1, 7.5, False)]
)
def test_what_will_be_late_is_given_up_before_its_next_stage(others: int, left_s: float, goes_on: bool) -> None:
    """10 s of steps are left of it. Whoever waits has the slot instead; where nobody does it may try (eight tenths)."""
    desk = Desk(replace(LIMITS, slots=1))
    desk.times.__init__({64: 1.0, 256: 1.0}, now=desk.clock)  # type: ignore[misc]
    until_s = desk.clock.now_s + 30.0
    call = Call(time_remaining_s=lambda: until_s - desk.clock.now_s)
    ticket = desk.admission.take(TWO, Priority.NORMAL, call)
    with ticket:
        for _ in range(others - 1):
            desk.take(1)
        with ticket.visit(64):
            desk.clock.now_s = until_s - left_s
        if goes_on:
            with ticket.visit(256):
                pass
            return
        said = rf"{left_s} s of the caller's deadline are left before stage 256"
        with pytest.raises(DeadlineExceeded, match=said), ticket.visit(256):
            raise AssertionError("the stage is begun")
    assert desk.figure("refused_total", reason="deadline_given_up") == 1


def test_no_deadline_and_no_limit_give_nothing_up() -> None:
    for limits, within_s in ((LIMITS, None), (replace(LIMITS, least_time=0.0), 0.5)):
        desk = Desk(replace(limits, slots=1))
        with desk.take(10, within_s=within_s) as ticket:
            desk.take(1)
            with ticket.visit(64):
                pass


def test_who_is_refused_costs_no_second_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, played = Desk(), []
    monkeypatch.setattr(admission, "forecast", lambda *given, **more: played.append(1) or real(*given, **more))
    running = [desk.take(10), desk.take(10)]

    def refused() -> int:
        played.clear()
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                desk.take(5, within_s=1.0)
        return len(played)

    assert refused() == 1
    desk.clock.now_s += 1.0
    assert refused() == 1, "it is not kept for long"
    desk.admission.leave(running[0])
    desk.take(3)
    assert refused() == 1, "nor where somebody has come"
    assert desk.figure("decision_seconds_count", outcome="refused") == 15
    assert desk.figure("decision_seconds_count", outcome="let_in") == 3


real = admission.forecast
