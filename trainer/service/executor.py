"""Where runs run: what the service needs of processes here and of a cluster alike."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from trainer.service.run_record import RunRecord


class ExecutorError(Exception):
    """A run cannot be started as it is; trying again does not help."""


class ExecutorAway(Exception):
    """The executor does not answer now; what it was asked is asked again later."""


class Phase(Enum):
    """How far an attempt is: not begun or gone, waiting for room, running, over."""

    ABSENT = "absent"
    WAITING = "waiting"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What is seen of an attempt.

    Attributes:
        place: where it runs; see Run in trainer.proto.
        status: why it waits.
        succeeded, asked_to_end, error: of one that is over: whether it ended well, whether it was asked to end, how it
            ended and what it said last.
        exit_code: status of the command that failed, negative or 128 + its number for a signal; None: not known.
        ended_s: when, since the epoch; None: not known.
    """

    phase: Phase
    place: str = ""
    status: str = ""
    succeeded: bool = False
    asked_to_end: bool = False
    error: str = ""
    exit_code: int | None = None
    ended_s: float | None = None


class Executor(Protocol):
    """Runs attempts. Each is known by its record's name, number and token, to another process's executor too.

    Everything here raises ExecutorAway where it cannot be done now.
    """

    max_runs: int
    """Attempts that may be launched at once; 0: any number."""

    def launch(self, record: RunRecord) -> None:
        """Start an attempt; where it is there already nothing happens.

        Raises:
            ExecutorError: it cannot be started.
        """
        ...

    def observe(self, record: RunRecord) -> Observed:
        """How an attempt does.

        Raises:
            ExecutorError: it cannot begin, and was told to end.
        """
        ...

    def stop(self, record: RunRecord) -> bool:
        """Ask an attempt to save its state and end; asking again changes nothing. Gives whether it could be asked yet."""
        ...

    def kill(self, record: RunRecord) -> None:
        """End it at once."""
        ...

    def remove(self, record: RunRecord) -> None:
        """Remove what is left of all attempts of a run that is over; what is gone is no error."""
        ...
