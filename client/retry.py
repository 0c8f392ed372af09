"""What is tried again: a call that may be repeated, while the service is away and has not begun to answer."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import grpc

from client.errors import ServiceFailed

_GROWTH = 3.0
_JITTER = 0.5  # a pause is this much shorter at most, so that callers do not come back all at once


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how soon. Where the service says when to come back (RetryInfo), that is when.

    Attributes:
        max_attempts: 1 tries nothing again.
        initial_backoff_s: the first pause; each one after it is three times as long.
        max_backoff_s: the longest pause.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 5.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: {self.max_attempts} is less than 1")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"initial_backoff_s: {self.initial_backoff_s} is not between 0 and max_backoff_s ({self.max_backoff_s})"
            )


NO_RETRY = RetryPolicy(max_attempts=1)


class Attempts:
    """The attempts of one call, under one deadline."""

    def __init__(
        self, policy: RetryPolicy, *, timeout_s: float, may_repeat: bool, failure: type[ServiceFailed]
    ) -> None:
        self._policy = policy
        self._give_up = time.monotonic() + timeout_s
        self._may_repeat = may_repeat
        self._failure = failure
        self._failed = 0
        self.has_begun = False
        """Whether the service has answered something: then nothing is tried again."""

    def remaining_s(self) -> float:
        """Seconds to the deadline."""
        return max(0.0, self._give_up - time.monotonic())

    def pause_s(self, error: grpc.RpcError) -> float:
        """Seconds until the next attempt.

        Raises:
            ServiceFailed: there is none.
        """
        failure = self._failure.of(error)
        self._failed += 1
        repeats = self._may_repeat and failure.code == "UNAVAILABLE" and not self.has_begun
        if not repeats or self._failed >= self._policy.max_attempts:
            raise failure from error
        pause_s = failure.retry_after_s
        if pause_s is None:
            backoff_s = self._policy.initial_backoff_s * _GROWTH ** (self._failed - 1)
            pause_s = min(backoff_s, self._policy.max_backoff_s) * (1 - _JITTER * random.random())
        if pause_s >= self.remaining_s():
            raise failure from error
        return pause_s
