"""`connection` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from client.call import Call
from client.channel import Tls, bearer, open_async_channel, trace_context
from client.errors import ServiceFailed
from client.health import TIMEOUT_S, ServiceHealth, check_call, unanswered
from client.retry import Attempts, RetryPolicy

T = TypeVar("T")


class AsyncConnection:
    """One channel to a service, of the event loop in which it was made."""

    def __init__(
        self, address: str, *, api_key: str, tls: Tls | None, retry: RetryPolicy, failure: type[ServiceFailed]
    ) -> None:
        """Connects at the first call; `failure` is what is raised where the service refuses or fails."""
        self.address = address
        self._channel = open_async_channel(address, tls)
        self._metadata = bearer(api_key)
        self._retry = retry
        self._failure = failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    async def ask(self, call: Call[T], *, timeout_s: float) -> T:
        """The one answer of a call."""
        attempts = self._attempts(call, timeout_s)
        while True:
            try:
                return call.read(await self._start(call, attempts))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_s(error))

    async def stream(self, call: Call[T], *, timeout_s: float) -> AsyncGenerator[T, None]:
        """All answers of a call; closing the generator cancels it, and so does cancelling the task that waits."""
        attempts = self._attempts(call, timeout_s)
        while True:
            answers = self._start(call, attempts)
            try:
                async for answer in answers:
                    attempts.has_begun = True
                    yield call.read(answer)
                return
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error)
            finally:
                answers.cancel()
            await asyncio.sleep(pause_s)

    async def health(self, services: Sequence[str]) -> tuple[ServiceHealth, ...]:
        """Whether each of these services answers; never fails."""
        found: list[ServiceHealth] = []
        for service in services:
            try:
                found.append(await self.ask(check_call(service, self.address), timeout_s=TIMEOUT_S))
            except ServiceFailed as failure:
                found.append(unanswered(service, self.address, failure))
        return tuple(found)

    def _attempts(self, call: Call[Any], timeout_s: float) -> Attempts:
        return Attempts(self._retry, timeout_s=timeout_s, may_repeat=call.may_repeat, failure=self._failure)

    def _start(self, call: Call[Any], attempts: Attempts) -> Any:
        method = getattr(call.stub(self._channel), call.method)
        return method(call.request, timeout=attempts.remaining_s(), metadata=(*self._metadata, *trace_context()))
