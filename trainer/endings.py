"""Statuses by which the trainer's processes tell how they ended. Whoever waits for them reads these, never what was said."""

from __future__ import annotations

from collections.abc import Iterable

from common.service.command import BAD_INPUT, FULL_DISK

HUNG = 3  # of the ranks that found another one hanging
OTHER = "other"
CAUSES = {HUNG: "hung", BAD_INPUT: "bad_input", FULL_DISK: "full_disk"}
"""Statuses that say why, and what they say, in short."""


def cause_of(code: int | None) -> str:
    """Why something failed that ended with this status (None: nobody knows it): a value of CAUSES, or OTHER."""
    return OTHER if code is None else CAUSES.get(code, OTHER)


def most_telling(codes: Iterable[int]) -> int:
    """Of the statuses of processes that failed together, in the order in which they did, the one that says why.

    When one rank hangs, has no room or was given what cannot be, the others fail for lack of it. They hang for lack of one
    that a signal has ended before (memory that runs out does): then that one says why. One that is killed after they
    have told of a hanging rank is that rank.
    """
    found = list(codes)
    before_hanging = found[: found.index(HUNG)] if HUNG in found else []
    killed = (code for code in before_hanging if by_signal(code))
    telling = (code for code in (FULL_DISK, BAD_INPUT, *killed, HUNG) if code in found)
    return next(telling, found[0])


def by_signal(code: int) -> bool:
    """Whether a signal ended what ended with this status: its number negative, or added to 128 as shells do."""
    return code < 0 or code > 128
