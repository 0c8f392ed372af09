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

    When one rank hangs, has no room or was given what cannot be, the others fail for lack of it.
    """
    found = list(codes)
    return next((code for code in (FULL_DISK, BAD_INPUT, HUNG) if code in found), found[0])
