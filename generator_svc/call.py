"""Whoever waits for pictures, as far as the work for them may know."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that is being answered.

    Attributes:
        is_cancelled: whether nobody waits any more; may be asked on any thread.
        time_remaining_s: seconds until the caller's deadline, negative past it; None: there is none.
        arrived_s: time.monotonic() of its arrival.
    """

    is_cancelled: Callable[[], bool] = lambda: False
    time_remaining_s: Callable[[], float | None] = lambda: None
    arrived_s: float = field(default_factory=time.monotonic)
