"""Whether the event loop is held up: what runs in it, all calls wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from prometheus_client import CollectorRegistry, Histogram

INTERVAL_S = 0.1
_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


@asynccontextmanager
async def observed_loop(registry: CollectorRegistry) -> AsyncIterator[None]:
    """While the block lasts: how much later than asked the loop of this task wakes it, a few times a second."""
    lag = Histogram(
        "reimagen_generator_event_loop_lag_seconds",
        "How much later than it was to the event loop went on.",
        buckets=_BUCKETS_S,
        registry=registry,
    )

    async def watch() -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(INTERVAL_S)
            lag.observe(max(0.0, time.perf_counter() - asked - INTERVAL_S))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
