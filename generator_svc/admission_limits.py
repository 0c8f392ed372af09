"""What admission lets in."""

from __future__ import annotations

from dataclasses import dataclass


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
            from one who would not. More than 1 leaves room for what an estimate cannot know, beside what is learnt of
            how forecasts turn out (`Margin`).
    """

    slots: int
    max_waiting: int
    max_waiting_s: float
    aging_s: float
    least_time: float
    least_time_crowded: float
