"""Who is drawn now, who waits and who is refused: decided at once, from what is known, before any work is done."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum, auto

from common.service.errors import DeadlineExceeded, ResourceExhausted, ServiceError, Unavailable
from generator_svc.admission_limits import AdmissionLimits
from generator_svc.admission_margin import Margin
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.call import Call
from generator_svc.estimates import StageTimes, StageWork, Visit
from generator_svc.forecast import Course, Forecast, forecast
from generator_svc.waiting_line import Priority, Waiting, WaitingLine

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 60.0
_ELSEWHERE_S = 0.2  # a replica that drains says: ask another one
_LATE_SHARE = 0.9  # of what the rest is estimated to take: an order with less left ends where others wait for its place
_FORECAST_KEPT_S = 0.1  # for how long one is as good as a new one where nobody has come or gone
_MAX_FORECASTS = 256  # that are kept
_PROBE_EVERY = 16  # so many refusals on an estimate that nothing has confirmed since, and one is let in to test it


class _State(Enum):
    WAITING = auto()
    RUNNING = auto()
    GONE = auto()


class Ticket:
    """One order's place: first in the line, then in a slot. A context: leaving it gives the place up."""

    def __init__(self, admission: Admission, works: Sequence[StageWork], call: Call, waiting: Waiting) -> None:
        self.works = tuple(works)
        self.call = call
        self.waiting = waiting
        self.position = 0  # how many go before it
        self.state = _State.WAITING
        self.refusal: ServiceError | None = None
        self.expected_s = 0.0  # from its arrival to its end; 0: not known
        self.expected_drawn_s = 0.0  # the same from its turn on
        self.begun_s = 0.0  # on admission's clock
        self.is_broken_off = False
        self._admission = admission
        self._changed = asyncio.Event()
        self._next_stage = 0
        self._visit: Visit | None = None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self._admission.leave(self)

    async def positions(self) -> AsyncIterator[int]:
        """How many go before it, whenever that changes; ends when its turn has come.

        Raises:
            DeadlineExceeded: its caller's deadline has passed, or can no longer be met.
            Unavailable: the service is stopping.
        """
        told = self.position
        while self.state is _State.WAITING:
            self._changed.clear()
            if self.position != told:
                told = self.position
                yield told
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._admission.patience_s(self)):
                    await self._changed.wait()
            self._admission.check_deadline(self)
        if self.refusal is not None:
            raise self.refusal

    @contextmanager
    def visit(self, stage: int) -> Iterator[Visit]:
        """The time that its pictures are in a stage; the block tells the visit of its steps, for the next forecast.

        Raises:
            DeadlineExceeded: the caller's deadline cannot be met any more; the stage is not begun.
        """
        self._next_stage = next(i for i, work in enumerate(self.works) if work.stage == stage)
        self._admission.check_stage(self)
        self._next_stage += 1
        with self._admission.times.visit(self.works[self._next_stage - 1]) as visit:
            self._visit = visit
            try:
                yield visit
            except BaseException:
                self.is_broken_off = True
                raise
            finally:
                self._visit = None

    def course(self) -> Course:
        """What is left of it."""
        if self._visit is None:
            return Course.whole(self.works[self._next_stage :])
        left = max(0, self._visit.work.steps - self._visit.steps_done)
        return Course(works=(self._visit.work, *self.works[self._next_stage :]), steps_left=left)

    def moved(self, position: int) -> None:
        """Told by admission: so many go before it now."""
        if position != self.position:
            self.position = position
            self._changed.set()

    def becomes(self, state: _State, refusal: ServiceError | None = None) -> None:
        """Told by admission: it runs, or is gone."""
        self.state, self.refusal, self.position = state, refusal, 0
        self._changed.set()


class Admission:
    """A bounded line in front of the pipeline's slots. Belongs to one event loop; nothing here waits or blocks."""

    def __init__(
        self,
        limits: AdmissionLimits,
        times: StageTimes,
        metrics: AdmissionMetrics,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.times = times
        self._limits = limits
        self._metrics = metrics
        self._now = now
        self._line = WaitingLine(aging_s=limits.aging_s)
        self._waiting: dict[Waiting, Ticket] = {}
        self._running: dict[Ticket, None] = {}
        self._is_draining = False
        self._unconfirmed = 0  # deadlines refused since the estimates were last confirmed
        self._confirmed_samples = 0
        self._left = asyncio.Event()
        self._line_margin, self._drawn_margin = Margin(), Margin()  # of forecasts from the arrival, and from the turn
        self._forecasts: dict[object, tuple[float, Forecast]] = {}
        metrics.capacity.set(limits.slots)

    @property
    def num_running(self) -> int:
        """Orders that are drawn."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Orders in the line."""
        return len(self._line)

    def take(self, works: Sequence[StageWork], priority: Priority, call: Call) -> Ticket:
        """A place for one order: in a slot where one is free, else in the line.

        Raises:
            ResourceExhausted: too much waits already; says when there is likely to be room.
            DeadlineExceeded: the caller's deadline has passed, or is sure to before the pictures are done.
            Unavailable: the service is stopping, and no slot is free.
        """
        try:
            ticket = self._take(tuple(works), priority, call)
        except ServiceError:
            self._metrics.decision_s.labels("refused").observe(time.monotonic() - call.arrived_s)
            raise
        self._metrics.decision_s.labels("let_in").observe(time.monotonic() - call.arrived_s)
        return ticket

    def _take(self, works: tuple[StageWork, ...], priority: Priority, call: Call) -> Ticket:
        now_s = self._now()
        work_s = self.times.work_s(works)
        ahead: list[Waiting] = []
        if len(self._running) >= self._limits.slots:
            if self._is_draining:
                raise self._refused("draining", _stopping())
            ahead = self._line.ahead(priority, now_s)
            self._check_room(ahead, work_s)
        expected = self._forecast(works, ahead)
        self._check_forecast(expected, len(ahead), call)
        waiting = self._line.join(priority, work_s, now_s)
        ticket = self._waiting[waiting] = Ticket(self, works, call, waiting)
        ticket.expected_s = expected.ends_s if self.times.knows(works) else 0.0
        self._fill_slots()
        return ticket

    async def next_leaving(self) -> None:
        """Wait until one that is drawn gives its place up."""
        await self._left.wait()

    def leave(self, ticket: Ticket) -> None:
        """Give a place up, whichever it is; more than once does nothing."""
        if ticket.state is _State.WAITING:
            self._metrics.abandoned.inc()
            self._remove(ticket, None)
        elif ticket.state is _State.RUNNING:
            del self._running[ticket]
            self._learn(ticket)
            self._metrics.in_flight.labels(_label(ticket)).dec()
            ticket.becomes(_State.GONE)
            left, self._left = self._left, asyncio.Event()
            left.set()
        self._fill_slots()

    def drain(self) -> None:
        """Refuse who waits, and from now on whoever would have to; what is drawn goes on."""
        self._is_draining = True
        for ticket in list(self._waiting.values()):
            self._remove(ticket, self._refused("draining", _stopping()))
        self._count()

    def patience_s(self, ticket: Ticket) -> float | None:
        """For how long a ticket may go on waiting: its deadline less what it takes alone."""
        remaining_s = ticket.call.time_remaining_s()
        if remaining_s is None:
            return None
        return max(0.0, remaining_s - self._limits.least_time * self.times.alone_s(ticket.works))

    def check_deadline(self, ticket: Ticket) -> None:
        """Refuse a ticket that waits, and whose deadline can no longer be met."""
        if ticket.state is _State.WAITING and self.patience_s(ticket) == 0.0:
            self._remove(ticket, self._refused("deadline_passed", _too_late(ticket)))
            self._count()

    def check_stage(self, ticket: Ticket) -> None:
        """Refuse an order its next stage where its deadline cannot be met any more: what it would take, others have.

        Raises:
            DeadlineExceeded: it cannot.
        """
        remaining_s = ticket.call.time_remaining_s()
        if remaining_s is None or not self._limits.least_time:
            return
        rest = ticket.course()
        least_s = self._limits.least_time * sum(w.steps * self.times.step_s(w.stage, w.rows) for w in rest.works)
        if self._waiting:
            others = [each.course() for each in self._running if each is not ticket]
            beside = forecast(others, [rest], slots=len(others) + 1, step_s=self.times.step_s)
            least_s = max(least_s, _LATE_SHARE * beside.ends_s)
        if remaining_s < least_s:
            size = rest.works[0].stage if rest.works else 0
            text = f"{remaining_s:.1f} s of the caller's deadline are left before stage {size}: too few for the rest"
            raise self._refused("deadline_given_up", DeadlineExceeded(text))

    def _learn(self, ticket: Ticket) -> None:
        """How the forecasts of one that gives its slot up have turned out."""
        now_s = self._now()
        drawn_s = ticket.expected_drawn_s if ticket.expected_s else 0.0
        is_done = not ticket.is_broken_off and not ticket.course().works
        for margin, wanted_s, since_s in (
            (self._line_margin, ticket.expected_s, ticket.waiting.arrived_s),
            (self._drawn_margin, drawn_s, ticket.begun_s),
        ):
            if is_done or now_s - since_s > wanted_s:  # one that is broken off late would have been later still
                margin.learn(wanted_s, now_s - since_s)
        self._metrics.margin.set(self._line_margin.factor)

    def _check_room(self, ahead: Sequence[Waiting], work_s: float) -> None:
        waiting_s = sum(waiting.work_s for waiting in ahead)
        is_full = len(ahead) >= self._limits.max_waiting
        if not is_full and (not ahead or waiting_s + work_s <= self._limits.max_waiting_s):
            return
        excess_s = waiting_s / max(1, len(ahead)) if is_full else waiting_s + work_s - self._limits.max_waiting_s
        text = (
            f"{len(self._running)} orders are drawn and {len(ahead)} wait, {waiting_s:.3g} s of work; no more are taken"
        )
        retry_after_s = min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, excess_s))
        raise self._refused("queue_full", ResourceExhausted(text, retry_after_s=retry_after_s, reason="QUEUE_FULL"))

    def _check_forecast(self, expected: Forecast, num_ahead: int, call: Call) -> None:
        remaining_s = call.time_remaining_s()
        if remaining_s is None:
            return
        if remaining_s <= 0.0:
            raise self._refused("deadline_passed", DeadlineExceeded("the caller's deadline has passed"))
        is_crowded = len(self._running) >= self._limits.slots
        least_s = self._least_time(self._line_margin if is_crowded else None) * expected.ends_s
        if remaining_s >= least_s or self._is_probe():
            return
        text = (
            f"{remaining_s:.1f} s are left until the caller's deadline; the pictures would be done in about"
            f" {expected.ends_s:.1f} s, {expected.begins_s:.1f} s of them waiting behind {num_ahead} orders"
        )
        raise self._refused("deadline_too_short", DeadlineExceeded(text, reason="DEADLINE_TOO_SHORT"))

    def _forecast(self, works: tuple[StageWork, ...], ahead: Sequence[Waiting]) -> Forecast:
        """Of an order behind those. One of a moment ago is taken again: who is refused changes nothing."""
        is_crowded = bool(self._waiting) or len(self._running) >= self._limits.slots
        key, now_s = (works, is_crowded, *(waiting.number for waiting in ahead)), self._now()
        made_s, expected = self._forecasts.get(key, (-math.inf, None))
        if expected is not None and now_s - made_s < _FORECAST_KEPT_S:
            return expected
        before = (Course.whole(self._waiting[waiting].works) for waiting in ahead)
        expected = self._played(before, Course.whole(works), is_crowded=is_crowded)
        if len(self._forecasts) >= _MAX_FORECASTS:
            self._forecasts.clear()
        self._forecasts[key] = now_s, expected
        return expected

    def _played(self, before: Iterable[Course], asked: Course, *, is_crowded: bool) -> Forecast:
        expected = forecast(
            (ticket.course() for ticket in self._running),
            (*before, asked),
            slots=self._limits.slots,
            step_s=self.times.step_s,
            followers=self._limits.slots - 1 if is_crowded else 0,
        )
        return replace(expected, ends_s=expected.ends_s + self.times.beside_s)

    def _least_time(self, crowded: Margin | None) -> float:
        """The share of a forecast that has to be left: by `crowded`, the margin of such forecasts, while others wait."""
        if crowded is None or not self._limits.least_time:
            return self._limits.least_time
        return self._limits.least_time_crowded * crowded.factor

    def _has_time(self, ticket: Ticket) -> bool:
        """Whether one whose turn has come is likely to be done in time; asked while others wait behind it."""
        remaining_s = ticket.call.time_remaining_s()
        if remaining_s is None or not self._waiting:
            return True
        return remaining_s >= self._least_time(self._drawn_margin) * ticket.expected_drawn_s

    def _is_probe(self) -> bool:
        """Whether to let one in against the estimates: one that refuses everybody would never be corrected.

        Where something is drawn, that will correct it.
        """
        if self._running:
            return False
        if self._confirmed_samples != self.times.samples:
            self._confirmed_samples, self._unconfirmed = self.times.samples, 0
        self._unconfirmed = (self._unconfirmed + 1) % _PROBE_EVERY
        return self._unconfirmed == 0

    def _fill_slots(self) -> None:
        now_s = self._now()
        while len(self._running) < self._limits.slots and (waiting := self._line.next(now_s)) is not None:
            ticket = self._waiting.pop(waiting)
            self._forecasts.clear()
            ticket.expected_drawn_s = self._forecast(ticket.works, ()).ends_s
            if not self._has_time(ticket):
                ticket.becomes(_State.GONE, self._refused("deadline_passed", _too_late(ticket)))
                continue
            self._running[ticket], ticket.begun_s = None, now_s
            self._forecasts.clear()
            label = _label(ticket)
            self._metrics.in_flight.labels(label).inc()
            self._metrics.wait_s.labels(label).observe(now_s - waiting.arrived_s)
            ticket.becomes(_State.RUNNING)
        self._count()

    def _remove(self, ticket: Ticket, refusal: ServiceError | None) -> None:
        self._line.leave(ticket.waiting)
        del self._waiting[ticket.waiting]
        ticket.becomes(_State.GONE, refusal)

    def _count(self) -> None:
        """Tell everybody who waits where they stand; somebody has come or gone."""
        self._forecasts.clear()
        for position, waiting in enumerate(self._line.in_order(self._now())):
            self._waiting[waiting].moved(position + 1)
        for priority in Priority:
            self._metrics.depth.labels(priority.name.lower()).set(self._line.depth(priority))
        self._metrics.waiting_work_s.set(sum(waiting.work_s for waiting in self._waiting))

    def _refused(self, reason: str, refusal: ServiceError) -> ServiceError:
        self._metrics.refused.labels(reason).inc()
        return refusal


def _label(ticket: Ticket) -> str:
    return ticket.waiting.priority.name.lower()


def _too_late(ticket: Ticket) -> DeadlineExceeded:
    remaining_s = max(0.0, ticket.call.time_remaining_s() or 0.0)
    text = f"waited until {remaining_s:.1f} s of the caller's deadline were left: too few to draw in"
    return DeadlineExceeded(text, reason="DEADLINE_TOO_SHORT")


def _stopping() -> Unavailable:
    return Unavailable(
        "the service is stopping; another replica may be there", retry_after_s=_ELSEWHERE_S, reason="DRAINING"
    )
