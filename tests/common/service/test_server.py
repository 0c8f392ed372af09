"""The life of a server: starting, answering, failing politely, draining."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from client.errors import retry_after_s
from common.service.config import ConfigError
from common.service.errors import NotFound, ResourceExhausted
from common.service.logs import JsonFormatter, TextFormatter
from common.service.server import ServerSettings, serve

NAME = "test.Echo"


async def _echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
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
    return request


async def _count(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    for number in range(3):
        yield b"%d" % number
    if request:
        await _echo(request, context)


class Host:
    """A server in this event loop, with a channel to it."""

    def __init__(self, path: Path, registry: CollectorRegistry, **settings: Any) -> None:
        self.address = f"unix:{path}/echo.sock"
        self.settings = ServerSettings(address=self.address, **settings)
        self.registry = registry
        self.may_open, self.ready, self.stop = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.is_closed = False

    @asynccontextmanager
    async def _opened(self, server: grpc.aio.Server) -> AsyncIterator[Sequence[str]]:
        await self.may_open.wait()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(_echo),
            "Count": grpc.unary_stream_rpc_method_handler(_count),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        yield (NAME,)
        self.is_closed = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[grpc.aio.Channel]:
        """The server from its start to the end of its draining."""
        serving = asyncio.create_task(
            serve(
                self.settings,
                opened=self._opened,
                registry=self.registry,
                announce=lambda address: self.ready.set(),
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
        """Let it open, and wait until it serves."""
        self.may_open.set()
        await self.ready.wait()

    def count(self, code: str, method: str = "Echo") -> float | None:
        """How many calls were answered with `code`."""
        labels = {"method": f"/{NAME}/{method}", "code": code}
        return self.registry.get_sample_value("reimagen_rpc_requests_total", labels)


def _run(tmp_path: Path, test: Callable[[Host], Awaitable[None]], **settings: Any) -> None:
    async def whole() -> None:
        await test(Host(tmp_path, CollectorRegistry(), **settings))

    asyncio.run(asyncio.wait_for(whole(), 20))


async def _health(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)).status


async def _failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_it_serves_only_when_open(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            echo = channel.unary_unary(f"/{NAME}/Echo")
            assert await _health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            starting = await _failure(echo(b"early"))
            assert starting.code() == grpc.StatusCode.UNAVAILABLE
            assert retry_after_s(starting) == 1
            await host.open()
            assert await _health(channel) == health_pb2.HealthCheckResponse.SERVING
            assert await echo(b"now") == b"now"
            unknown = await _failure(channel.unary_unary(f"/{NAME}/Other")(b""))
            assert unknown.code() == grpc.StatusCode.UNIMPLEMENTED
        assert host.is_closed

    _run(tmp_path, test)


def test_errors_are_statuses_and_give_nothing_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            echo = channel.unary_unary(f"/{NAME}/Echo")
            missing = await _failure(echo(b"missing"))
            assert (missing.code(), missing.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
            full = await _failure(echo(b"full"))
            assert (full.code(), retry_after_s(full)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 3)
            by_hand = await _failure(echo(b"abort"))
            assert (by_hand.code(), by_hand.details()) == (grpc.StatusCode.ALREADY_EXISTS, "by hand")
            bug = await _failure(echo(b"bug"))
            assert bug.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in str(bug)
        for code in ("NOT_FOUND", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "INTERNAL"):
            assert host.count(code) == 1, code

    with caplog.at_level(logging.INFO):
        _run(tmp_path, test)
    assert "ZeroDivisionError: secret" in caplog.text


def test_streams_fail_politely_too(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            count = channel.unary_stream(f"/{NAME}/Count")
            assert [part async for part in count(b"")] == [b"0", b"1", b"2"]
            call = count(b"missing")
            assert [await call.read() for _ in range(3)] == [b"0", b"1", b"2"]
            assert (await _failure(call.read())).code() == grpc.StatusCode.NOT_FOUND
        assert (host.count("OK", "Count"), host.count("NOT_FOUND", "Count")) == (1, 1)

    _run(tmp_path, test)


def test_calls_under_way_are_finished(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            slow = asyncio.ensure_future(channel.unary_unary(f"/{NAME}/Echo")(b"slow"))
            await asyncio.sleep(0.1)
            host.stop.set()
            assert await slow == b"slow"

    _run(tmp_path, test, grace_s=5)


def test_calls_that_outlast_the_grace_are_cut(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            slow = asyncio.ensure_future(channel.unary_unary(f"/{NAME}/Echo")(b"slow"))
            await asyncio.sleep(0.1)
            host.stop.set()
            assert (await _failure(slow)).code() == grpc.StatusCode.UNAVAILABLE
        assert host.count("CANCELLED") == 1

    _run(tmp_path, test, grace_s=0.05)


def test_large_requests_are_refused(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            refused = await _failure(channel.unary_unary(f"/{NAME}/Echo")(b"x" * 2000))
            assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    _run(tmp_path, test, max_request_bytes=1000)


def test_what_cannot_be_opened_ends_the_serving(tmp_path: Path) -> None:
    @asynccontextmanager
    async def opened(server: grpc.aio.Server) -> AsyncIterator[Sequence[str]]:
        raise FileNotFoundError("weights")
        yield ()

    with pytest.raises(FileNotFoundError, match="weights"):
        asyncio.run(serve(ServerSettings(address=f"unix:{tmp_path}/s"), opened=opened, registry=CollectorRegistry()))


@asynccontextmanager
async def _nothing(server: grpc.aio.Server) -> AsyncIterator[Sequence[str]]:
    yield ()


async def _serve_briefly(address: str) -> None:
    settings = ServerSettings(address=address)
    await asyncio.wait_for(serve(settings, opened=_nothing, registry=CollectorRegistry()), 5)


@pytest.mark.parametrize(
    "address", ["nowhere", ":1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "unix:/nowhere/at/all.sock"]
)
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(ConfigError, match="address: "):
        asyncio.run(_serve_briefly(address))


def _record(**extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "test", "msg": "called %s", "args": ("twice",), **extra})


def test_logs_are_lines_of_json_or_text() -> None:
    line = json.loads(JsonFormatter("echo").format(_record(code="OK", path=Path("x"))))
    assert line["service"] == "echo"
    assert (line["message"], line["code"], line["path"]) == ("called twice", "OK", "x")
    assert TextFormatter().format(_record(code="OK")).endswith("test: called twice [code=OK]")
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError as error:
        traced = _record(exc_info=(type(error), error, error.__traceback__))
    assert "ZeroDivisionError: why" in json.loads(JsonFormatter("echo").format(traced))["trace"]
