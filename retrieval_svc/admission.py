"""How much is worked on at once, and how much may wait: what is beyond that is refused at once, not kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from common.service.errors import ResourceExhausted

T = TypeVar("T")

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.05, 5.0
_FIRST_GUESS_S = 0.02  # of the time that one piece of work takes
_SMOOTHING = 0.1  # weight of the newest piece in the running mean


class Admission:
    """Lets so many pieces of work run on an executor and so many wait. Belongs to one event loop."""

    def __init__(self, executor: Executor, *, at_work: int, waiting: int) -> None:
        """`executor` has at least `at_work` threads."""
        self._executor = executor
        self._slots = asyncio.Semaphore(at_work)
        self._num_slots = at_work
        self._num_at_work = 0
        self._max_waiting = waiting
        self._num_waiting = 0
        self._mean_s = _FIRST_GUESS_S

    @property
    def num_at_work(self) -> int:
        """Pieces that run, those among them that nobody waits for any more."""
        return self._num_at_work

    @property
    def num_waiting(self) -> int:
        """Pieces that wait for a slot."""
        return self._num_waiting

    async def run(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """Run `work` on a thread when there is a slot.

        Cancelled while it waits, it leaves the queue at once. A thread cannot be interrupted: cancelled while it runs, its
        result is thrown away and its slot is free when it ends.

        Args:
            patient: it waits however many wait; for callers who bound themselves how many they send.

        Raises:
            ResourceExhausted: all slots are taken, and as many wait as may; says when to come again.
        """
        if not patient and self._slots.locked() and self._num_waiting >= self._max_waiting:
            raise ResourceExhausted(
                f"{self._num_at_work} requests are at work and {self._num_waiting} wait; no more are taken",
                retry_after_s=self._retry_after_s(),
                reason="TOO_MANY_REQUESTS",
            )
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        loop = asyncio.get_running_loop()
        started = loop.time()

        def ended() -> None:
            self._num_at_work -= 1
            self._mean_s += _SMOOTHING * (loop.time() - started - self._mean_s)
            self._slots.release()

        self._num_at_work += 1
        try:
            future = self._executor.submit(work)
        except BaseException:
            ended()
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended))
        return await asyncio.wrap_future(future)

    def _retry_after_s(self) -> float:
        """The time until what waits now has been done."""
        estimate_s = self._mean_s * (self._num_waiting + 1) / self._num_slots
        return min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, estimate_s))
