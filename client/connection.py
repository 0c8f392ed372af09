"""Makes calls over one channel: deadline, key, retries, errors. `async_connection` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from client.call import Call
from client.channel import Tls, bearer, open_channel, trace_context
from client.errors import ServiceFailed
from client.health import TIMEOUT_S, ServiceHealth, check_call, unanswered
from client.retry import Attempts, RetryPolicy

T = TypeVar("T")


class Connection:
    """One channel to a service; safe to use from several threads."""

    def __init__(
        self, address: str, *, api_key: str, tls: Tls | None, retry: RetryPolicy, failure: type[ServiceFailed]
    ) -> None:
        """Connects at the first call; `failure` is what is raised where the service refuses or fails."""
        self.address = address
        self._channel = open_channel(address, tls)
        self._metadata = bearer(api_key)
        self._retry = retry
        self._failure = failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def ask(self, call: Call[T], *, timeout_s: float) -> T:
        """The one answer of a call."""
        attempts = self._attempts(call, timeout_s)
        while True:
            try:
                return call.read(self._start(call, attempts))
            except grpc.RpcError as error:
                time.sleep(attempts.pause_s(error))

    def stream(self, call: Call[T], *, timeout_s: float) -> Generator[T, None, None]:
        """All answers of a call; closing the generator cancels it."""
        attempts = self._attempts(call, timeout_s)
        while True:
            answers = self._start(call, attempts)
            try:
                for answer in answers:
                    attempts.has_begun = True
                    yield call.read(answer)
                return
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error)
            finally:
                answers.cancel()
            time.sleep(pause_s)

    def health(self, services: Sequence[str]) -> tuple[ServiceHealth, ...]:
        """Whether each of these services answers; never fails."""
        found: list[ServiceHealth] = []
        for service in services:
            try:
                found.append(self.ask(check_call(service, self.address), timeout_s=TIMEOUT_S))
            except ServiceFailed as failure:
                found.append(unanswered(service, self.address, failure))
        return tuple(found)

    def _attempts(self, call: Call[Any], timeout_s: float) -> Attempts:
        return Attempts(self._retry, timeout_s=timeout_s, may_repeat=call.may_repeat, failure=self._failure)

    def _start(self, call: Call[Any], attempts: Attempts) -> Any:
        method = getattr(call.stub(self._channel), call.method)
        return method(call.request, timeout=attempts.remaining_s(), metadata=(*self._metadata, *trace_context()))
