"""Who is next: strict priorities that age, first come first served within one. No clock, no event loop of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from itertools import count


class Priority(IntEnum):
    """Who goes first; the numbers are those of generator.proto."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(kw_only=True, eq=False)
class Waiting:
    """One that waits.

    Attributes:
        priority: as it was asked for.
        arrived_s: when it came, on the line's clock.
        work_s: what it will cost.
        number: counts arrivals, so that no two are alike.
    """

    priority: Priority
    arrived_s: float
    work_s: float
    number: int


class WaitingLine:
    """Those who wait, in order.

    One that has waited `aging_s` goes as if it were one priority higher, after twice that two: so that LOW waits for a
    bounded time however many HIGH ones come. Among equals the one that came first goes first.
    """

    def __init__(self, *, aging_s: float) -> None:
        self._aging_s = aging_s
        self._lanes: dict[Priority, deque[Waiting]] = {priority: deque() for priority in Priority}
        self._numbers = count()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def depth(self, priority: Priority) -> int:
        """How many of a priority wait."""
        return len(self._lanes[priority])

    def join(self, priority: Priority, work_s: float, now_s: float) -> Waiting:
        """Put one more in."""
        waiting = Waiting(priority=priority, arrived_s=now_s, work_s=work_s, number=next(self._numbers))
        self._lanes[priority].append(waiting)
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """Take one out, wherever it stands."""
        self._lanes[waiting.priority].remove(waiting)

    def next(self, now_s: float) -> Waiting | None:
        """Take out the one whose turn it is; None where nobody waits."""
        # Within a lane the oldest has aged most: the heads of the lanes are all that can be next.
        heads = [lane[0] for lane in self._lanes.values() if lane]
        if not heads:
            return None
        first = min(heads, key=lambda waiting: self._rank(waiting, now_s))
        self._lanes[first.priority].popleft()
        return first

    def in_order(self, now_s: float) -> list[Waiting]:
        """All of them, the next one first."""
        everyone = [waiting for lane in self._lanes.values() for waiting in lane]
        return sorted(everyone, key=lambda waiting: self._rank(waiting, now_s))

    def ahead(self, priority: Priority, now_s: float) -> list[Waiting]:
        """Those who would go before one that came now with `priority`, the next one first."""
        return [waiting for waiting in self.in_order(now_s) if self._level(waiting, now_s) >= priority]

    def _rank(self, waiting: Waiting, now_s: float) -> tuple[int, int]:
        return -self._level(waiting, now_s), waiting.number

    def _level(self, waiting: Waiting, now_s: float) -> int:
        aged = int((now_s - waiting.arrived_s) / self._aging_s)
        return min(Priority.HIGH, waiting.priority + aged)
