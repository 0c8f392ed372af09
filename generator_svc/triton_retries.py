"""A request to Triton that is sent again when an endpoint fails, and how often that may be.

A stage has no effect but its pictures, and its plans decide those: it may be run again from its beginning, anywhere.
Two things bound what that adds to the load. An endpoint that is certainly down is ejected, and nothing is sent to it
until a canary has passed: requests wait for that, or go elsewhere. Any other failure spends from a budget that all
requests share (the throttle of gRFC A6): when most attempts fail, none is made a second time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.service.errors import DeadlineExceeded, Unavailable
from generator_svc.call import Call
from generator_svc.triton_endpoint import Endpoint
from generator_svc.triton_endpoints import Endpoints
from generator_svc.triton_errors import RETRY_AFTER_S, EndpointFailed, Kind, kind_of
from generator_svc.triton_metrics import TritonMetrics

MAX_ATTEMPTS = 6
_MAX_FAILURES: dict[Kind, int] = {
    "stub_dead": 3,
    "raised": 2,
}  # of one request, which may well be what breaks the model
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.02, 0.5
_CANCELLED_EVERY_S = 0.1  # how often a call is asked whether anybody still waits for it

T = TypeVar("T")
Told = TypeVar("Told")


class RetryBudget:
    """A bucket of tokens: a failure takes one, a success gives a part of one back; past its half nothing is retried."""

    def __init__(self, *, max_tokens: float = 32.0, per_success: float = 0.6) -> None:
        """With 0.6 for a success, failures of up to 37 in 100 can go on being retried."""
        self._max_tokens = self._tokens = max_tokens
        self._per_success = per_success

    @property
    def allows(self) -> bool:
        """Whether an attempt may be made again."""
        return self._tokens > self._max_tokens / 2

    def succeed(self) -> None:
        """An attempt has succeeded."""
        self._tokens = min(self._max_tokens, self._tokens + self._per_success)

    def fail(self) -> None:
        """An attempt has failed."""
        self._tokens = max(0.0, self._tokens - 1.0)


async def with_retries(
    endpoints: Endpoints[Told],
    attempt: Callable[[Endpoint[Told], float | None], Awaitable[T]],
    *,
    budget: RetryBudget,
    metrics: TritonMetrics,
    call: Call,
) -> T:
    """What `attempt` gives of an endpoint, the first or another.

    Args:
        endpoints: of the model.
        attempt: is given an endpoint and the seconds that are left (None: there is no limit); called again, it begins
            anew.
        budget: of the model.
        metrics: where attempts are counted.
        call: who waits; when nobody does, the attempt under way is cancelled.

    Raises:
        Unavailable: no endpoint has done it, and no more attempts are made.
        DeadlineExceeded: the caller's deadline has passed.
        Exception: whatever else `attempt` raises.
        asyncio.CancelledError: `call` is cancelled.
    """
    remaining_s = call.time_remaining_s()
    deadline = None if remaining_s is None else time.monotonic() + remaining_s
    work = asyncio.ensure_future(_attempts(endpoints, attempt, budget, metrics, deadline))
    try:
        while not (await asyncio.wait({work}, timeout=_CANCELLED_EVERY_S))[0]:
            if call.is_cancelled():
                raise asyncio.CancelledError("nobody waits any more")
        return work.result()
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})


async def _attempts(
    endpoints: Endpoints[Told],
    attempt: Callable[[Endpoint[Told], float | None], Awaitable[T]],
    budget: RetryBudget,
    metrics: TritonMetrics,
    deadline: float | None,
) -> T:
    model, failed, kinds = endpoints.model, None, Counter[Kind]()
    for number in range(1, MAX_ATTEMPTS + 1):
        try:
            async with endpoints.lease(deadline=deadline, avoid=failed) as endpoint:
                failed = endpoint
                metrics.attempts.labels(model).inc()
                if number > 1:
                    metrics.retries.labels(model).inc()
                result = await attempt(endpoint, _remaining_s(deadline))
        except Exception as error:
            if kind := kind_of(error):
                metrics.errors.labels(model, kind).inc()
            if not isinstance(error, EndpointFailed):
                raise
            kinds[error.kind] += 1
            if number == MAX_ATTEMPTS or kinds[error.kind] == _MAX_FAILURES.get(error.kind):
                raise
            await _pause(error, number, budget)
        else:
            budget.succeed()
            return result
    raise AssertionError("the last attempt returns or raises")


async def _pause(error: EndpointFailed, number: int, budget: RetryBudget) -> None:
    """Before the next attempt.

    Raises:
        Unavailable: the budget has nothing left for it.
    """
    if not error.is_down:
        budget.fail()
        if not budget.allows:
            raise Unavailable(
                f"{error.description} (most requests to it fail: it is not sent again)",
                retry_after_s=RETRY_AFTER_S,
                reason=error.reason,
            ) from error
    await asyncio.sleep(random.uniform(0.5, 1.0) * min(_MAX_BACKOFF_S, _MIN_BACKOFF_S * 2**number))


def _remaining_s(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    if (remaining_s := deadline - time.monotonic()) <= 0:
        raise DeadlineExceeded("the caller's deadline has passed")
    return remaining_s
