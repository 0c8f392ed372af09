"""Admission beside a plain model: every order is somewhere, once, and the next one is the right one."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from generator_svc.admission import Ticket
from generator_svc.waiting_line import Priority
from tests.generator_svc.desk import LIMITS, Desk


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

    def certain_s(self, orders: list[Modeled]) -> float:
        """Until the last of these is certain to be done, though as many as it come behind it."""
        return sum(each.seconds for each in orders) + (LIMITS.slots - 1) * orders[-1].seconds

    def fill(self) -> None:
        while self.waiting and len(self.running) < LIMITS.slots:
            first = self.in_order()[0]
            self.waiting.remove(first)
            if first.ticket.refusal is not None:  # its turn has come too late
                assert self.waiting and first.until_s is not None and isinstance(first.ticket.refusal, DeadlineExceeded)
                left_s = first.until_s - self.desk.clock.now_s
                assert left_s < self.certain_s([*self.running, first]), "it would have been met with certainty"
                self.gone.append(first)
                continue
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
            everything_s = LIMITS.slots * seconds + ahead_s + sum(each.seconds for each in self.running)
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
