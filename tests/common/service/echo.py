"""A service that echoes, in this event loop, to see what the mechanism around calls does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from common.service.errors import NotFound, ResourceExhausted
from common.service.server import ServerSettings, serve

NAME = "test.Echo"
WAIT_S = 20.0


async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """Gives back what it is sent; some words do otherwise."""
    match request:
        case b"missing":
            raise NotFound("no such thing")
        case b"full":
            raise ResourceExhausted("queue is full", retry_after_s=3)
        case b"bug":
            raise ZeroDivisionError("secret")
        case b"abort":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "by hand")
        case b"slow":
            await asyncio.sleep(0.3)
        case b"peer":
            return context.peer().encode()
        case b"own timeout":
            raise TimeoutError
    return request


async def count(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Counts to two, then echoes."""
    for number in range(3):
        yield b"%d" % number
    if request:
        await echo(request, context)


async def chat(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    """Echoes one after the other."""
    async for request in requests:
        yield await echo(request, context)


class Host:
    """A server in this event loop, with a channel to it."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.settings = ServerSettings(**{"address": f"unix:{path}/echo.sock", "grace_s": 2.0, **settings})
        self.address = self.settings.address
        self.registry = CollectorRegistry()
        self.may_open, self.ready, self.stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.is_closed = False

    @asynccontextmanager
    async def _opened(self, server: grpc.aio.Server) -> AsyncIterator[Sequence[str]]:
        await self.may_open.wait()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Change": grpc.unary_unary_rpc_method_handler(echo),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
            "Parsed": grpc.unary_unary_rpc_method_handler(echo, request_deserializer=lambda raw: raw.decode("ascii")),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        yield (NAME,)
        self.is_closed = True

    def _announce(self, address: str) -> None:
        self.address = address
        self.ready.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[grpc.aio.Channel]:
        """The server from its start to the end of its draining."""
        self._serving = serving = asyncio.create_task(
            serve(
                self.settings,
                opened=self._opened,
                registry=self.registry,
                admin_methods=frozenset({f"/{NAME}/Change"}),
                announce=self._announce,
                stop=self.stop,
            )
        )
        try:
            async with grpc.aio.insecure_channel(self.address) as channel:
                yield channel
        finally:
            self.stop.set()
            await asyncio.wait_for(serving, 10)

    async def open(self) -> None:
        """Let it open, and wait until it serves; raises what it ends with where it does not."""
        self.may_open.set()
        ready = asyncio.create_task(self.ready.wait())
        await asyncio.wait([ready, self._serving], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            await self._serving

    def count(self, code: str, method: str = "Echo") -> float | None:
        """How many calls were answered with `code`."""
        label = method if method == "other" else f"{NAME}/{method}"
        labels = {"grpc_method": label, "grpc_status": code}
        return self.registry.get_sample_value("grpc_server_call_duration_seconds_count", labels)


def run(tmp_path: Path, test: Callable[[Host], Awaitable[None]], **settings: Any) -> None:
    """Run `test` with a host of these settings."""

    async def whole() -> None:
        await test(Host(tmp_path, **settings))

    asyncio.run(asyncio.wait_for(whole(), WAIT_S))


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error that `call` ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
