"""Who is drawn now, who waits and who is refused: decided at once, from what is known, before any work is done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum, auto

from common.service.errors import DeadlineExceeded, ResourceExhausted, ServiceError, Unavailable
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.call import Call
from generator_svc.estimates import StageTimes, StageWork, Visit
from generator_svc.forecast import Course, Forecast, forecast
from generator_svc.waiting_line import Priority, Waiting, WaitingLine

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 60.0
_ELSEWHERE_S = 0.2  # a replica that drains says: ask another one
_PROBE_EVERY = 16  # so many refusals on an estimate that nothing has confirmed since, and one is let in to test it


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """What is let in.

    Attributes:
        slots: orders that are drawn at once.
        max_waiting: orders that may wait, of one priority and those above it.
        max_waiting_s: the work that may wait, likewise, in seconds of the stages; an order that would wait alone may.
        aging_s: seconds of waiting after which an order goes as if it were one priority higher.
        least_time: share of the time that an order is estimated to take under which its caller's deadline is refused at
            once; 0 refuses no deadline that has not passed.
        least_time_crowded: the same while others wait: a slot that is given to one who will miss the deadline is taken
            from one who would not. More than 1 leaves room for what an estimate cannot know.
    """

    slots: int
    max_waiting: int
    max_waiting_s: float
    aging_s: float
    least_time: float
    least_time_crowded: float


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
        """The time that its pictures are in a stage; the block tells the visit of its steps, for the next forecast."""
        self._next_stage = 1 + next(i for i, work in enumerate(self.works) if work.stage == stage)
        with self._admission.times.visit(self.works[self._next_stage - 1]) as visit:
            self._visit = visit
            try:
                yield visit
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
        now_s = self._now()
        work_s = self.times.work_s(works)
        ahead: list[Waiting] = []
        if len(self._running) >= self._limits.slots:
            if self._is_draining:
                raise self._refused("draining", _stopping())
            ahead = self._line.ahead(priority, now_s)
            self._check_room(ahead, work_s)
        self._check_forecast(works, ahead, call)
        waiting = self._line.join(priority, work_s, now_s)
        ticket = self._waiting[waiting] = Ticket(self, works, call, waiting)
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

    def _check_forecast(self, works: Sequence[StageWork], ahead: Sequence[Waiting], call: Call) -> None:
        remaining_s = call.time_remaining_s()
        if remaining_s is None:
            return
        if remaining_s <= 0.0:
            raise self._refused("deadline_passed", DeadlineExceeded("the caller's deadline has passed"))
        expected = self._forecast(works, ahead)
        is_crowded = len(self._running) >= self._limits.slots
        if remaining_s >= self._least_time(is_crowded) * expected.ends_s or self._is_probe():
            return
        text = (
            f"{remaining_s:.1f} s are left until the caller's deadline; the pictures would be done in about"
            f" {expected.ends_s:.1f} s, {expected.begins_s:.1f} s of them waiting behind {len(ahead)} orders"
        )
        raise self._refused("deadline_too_short", DeadlineExceeded(text, reason="DEADLINE_TOO_SHORT"))

    def _forecast(self, works: Sequence[StageWork], ahead: Sequence[Waiting]) -> Forecast:
        is_crowded = bool(self._waiting) or len(self._running) >= self._limits.slots
        expected = forecast(
            (ticket.course() for ticket in self._running),
            (Course.whole(each) for each in (*(self._waiting[waiting].works for waiting in ahead), works)),
            slots=self._limits.slots,
            step_s=self.times.step_s,
            followers=self._limits.slots - 1 if is_crowded else 0,
        )
        return replace(expected, ends_s=expected.ends_s + self.times.beside_s)

    def _least_time(self, is_crowded: bool) -> float:
        return self._limits.least_time_crowded if is_crowded and self._limits.least_time else self._limits.least_time

    def _has_time(self, ticket: Ticket) -> bool:
        """Whether one whose turn has come is likely to be done in time; asked while others wait behind it."""
        remaining_s = ticket.call.time_remaining_s()
        if remaining_s is None or not self._waiting:
            return True
        return remaining_s >= self._least_time(True) * self._forecast(ticket.works, ()).ends_s

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
            if not self._has_time(ticket):
                ticket.becomes(_State.GONE, self._refused("deadline_passed", _too_late(ticket)))
                continue
            self._running[ticket] = None
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
        """Tell everybody who waits where they stand."""
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
