"""A watch that outlives its connection: where to begin again, and what was told already."""

from __future__ import annotations

import time

from client.errors import ServiceFailed
from client.training_types import Run, RunEvent

PATIENCE_S = 60.0
PAUSE_S = 1.0
_LOST = ("UNAVAILABLE", "CANCELLED")  # of a service that ends, orderly or not; whoever cancels itself does not listen


class Patience:
    """How long a service may be away before it is given up."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._heard = time.monotonic()

    def heard(self) -> None:
        """It has said something."""
        self._heard = time.monotonic()

    def pause_s(self, failure: ServiceFailed) -> float:
        """Seconds until it is asked again.

        Raises:
            ServiceFailed: it is not.
        """
        if failure.code not in _LOST or time.monotonic() - self._heard > self._patience_s:
            raise failure
        return failure.retry_after_s or PAUSE_S


class RunCursor(Patience):
    """What of a run's events was seen so far."""

    def __init__(self, from_step: int) -> None:
        super().__init__()
        self.from_step = from_step
        self._run: Run | None = None
        self._newest: dict[type, tuple[str, set[tuple[str, int]]]] = {}  # of figures and of grids

    def takes(self, event: RunEvent) -> bool:
        """Whether it is new. What is told comes in the order of time, and from some step on again in the same order."""
        self.heard()
        if isinstance(event, Run):
            is_new, self._run = event != self._run or event.is_over, event  # the last one tells that all is told
            return is_new
        newest, seen = self._newest.get(type(event), ("", set()))
        at = event.time.rstrip("Z")  # without it times of any number of digits are ordered as their texts are
        key = (getattr(event, "kind", ""), event.step)
        if at < newest or (at == newest and key in seen):
            return False
        self._newest[type(event)] = at, (seen | {key} if at == newest else {key})
        self.from_step = event.step
        return True
