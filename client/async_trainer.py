"""`trainer` for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from client import training_calls as calls
from client.async_connection import AsyncConnection
from client.channel import Tls
from client.health import ServiceHealth
from client.retry import RetryPolicy
from client.run_cursor import Patience, RunCursor
from client.training_calls import TIMEOUT_S, WATCH_TIMEOUT_S, TrainingFailed
from client.training_types import Export, Run, RunEvent, RunSpec


class AsyncTrainerClient:
    """One channel to a trainer; see `TrainerClient`."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """See `TrainerClient`."""
        policy = retry or RetryPolicy()
        self._connection = AsyncConnection(address, api_key=api_key, tls=tls, retry=policy, failure=TrainingFailed)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._connection.close()

    async def start(self, spec: RunSpec, *, name: str = "", request_id: str = "") -> Run:
        """Start a run, or go on with the one of that name; see `TrainerClient.start`."""
        return await self._connection.ask(calls.start(spec, name, request_id), timeout_s=self._timeout_s)

    async def get(self, name: str) -> Run:
        """One run."""
        return await self._connection.ask(calls.get(name), timeout_s=self._timeout_s)

    async def list(self, *, states: Sequence[str] = (), page_size: int = 0) -> AsyncIterator[Run]:
        """Runs by name, page by page; `states` empty: in any state."""
        token = ""
        while True:
            page = calls.list_page(states, page_size, token)
            runs, token = await self._connection.ask(page, timeout_s=self._timeout_s)
            for run in runs:
                yield run
            if not token:
                return

    async def watch(
        self, name: str, *, from_step: int = 0, samples: bool = True, timeout_s: float = WATCH_TIMEOUT_S
    ) -> AsyncGenerator[RunEvent, None]:
        """What a run says until it is over; see `TrainerClient.watch`. Closing the generator cancels the call."""
        cursor, give_up = RunCursor(from_step), time.monotonic() + timeout_s
        while True:
            call = calls.watch(name, cursor.from_step, samples)
            try:
                async with aclosing(self._connection.stream(call, timeout_s=give_up - time.monotonic())) as events:
                    async for event in events:
                        if cursor.takes(event):
                            yield event
                return
            except TrainingFailed as failure:
                pause_s = cursor.pause_s(failure)
            await asyncio.sleep(pause_s)

    async def cancel(self, name: str) -> Run:
        """End a run; while it saves its state it is still running, and `cancelling`."""
        return await self._connection.ask(calls.cancel(name), timeout_s=self._timeout_s)

    async def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Remove a run that is over, with all that it has saved; see `TrainerClient.delete`."""
        await self._connection.ask(calls.delete(name, missing_ok), timeout_s=self._timeout_s)

    async def export(
        self,
        name: str,
        weights: str,
        *,
        on_progress: Callable[[Export], object] | None = None,
        request_id: str = "",
        replace: bool = False,
        timeout_s: float = WATCH_TIMEOUT_S,
    ) -> Export:
        """Write a run's averaged weights to a folder of the service's, and wait; see `TrainerClient.export`."""
        call = calls.export(name, weights, request_id, replace)
        patience, give_up = Patience(), time.monotonic() + timeout_s
        last: Export | None = None
        while True:
            try:
                async with aclosing(self._connection.stream(call, timeout_s=give_up - time.monotonic())) as said:
                    async for last in said:
                        patience.heard()
                        if on_progress is not None:
                            on_progress(last)
                return calls.exported(last)
            except TrainingFailed as failure:
                pause_s = patience.pause_s(failure)
            await asyncio.sleep(pause_s)

    async def health(self) -> tuple[ServiceHealth, ...]:
        """Whether the service answers; never fails."""
        return await self._connection.health(calls.SERVICES)
