"""The life of a server: starting, answering, failing politely, draining."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from client.errors import reason, retry_after_s
from common.service.config import ConfigError
from common.service.logs import JsonFormatter, TextFormatter
from common.service.server import ServerSettings, serve
from tests.common.service.echo import NAME, Host, failure, run


async def _health(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)).status


def test_it_serves_only_when_open(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            echo = channel.unary_unary(f"/{NAME}/Echo")
            assert await _health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            starting = await failure(echo(b"early"))
            assert starting.code() == grpc.StatusCode.UNAVAILABLE
            assert retry_after_s(starting) == 1
            await host.open()
            assert await _health(channel) == health_pb2.HealthCheckResponse.SERVING
            assert await echo(b"now") == b"now"
            unknown = await failure(channel.unary_unary(f"/{NAME}/Other")(b""))
            assert (unknown.code(), reason(unknown)) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN")
        assert host.is_closed

    run(tmp_path, test)


def test_old_connections_take_no_new_calls_and_end_those_they_have(tmp_path: Path) -> None:
    """What makes clients of a headless service find replicas that are new."""

    async def test(host: Host) -> None:
        async with host.running():
            await host.open()
            async with grpc.aio.insecure_channel(host.address) as channel:
                echo = channel.unary_unary(f"/{NAME}/Echo")
                peers = set()
                for _ in range(8):
                    slow = asyncio.ensure_future(echo(b"slow"))  # 0.3 s: longer than a connection's age
                    peers.add(await echo(b"peer"))
                    assert await slow == b"slow"
                assert len(peers) >= 4

    run(tmp_path, test, address="127.0.0.1:0", max_connection_age_s=0.1)


def test_a_connection_serves_for_good_unless_told_otherwise(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running():
            await host.open()
            async with grpc.aio.insecure_channel(host.address) as channel:
                echo = channel.unary_unary(f"/{NAME}/Echo")
                first = await echo(b"peer")
                await echo(b"slow")
                assert await echo(b"peer") == first

    run(tmp_path, test, address="127.0.0.1:0")


@pytest.mark.parametrize("seconds", [-1.0, 1e9, float("nan")])
def test_an_age_that_cannot_be_is_refused(tmp_path: Path, seconds: float) -> None:
    async def test(host: Host) -> None:
        with pytest.raises(ConfigError, match="max_connection_age_s"):
            async with host.running():
                await host.open()

    run(tmp_path, test, max_connection_age_s=seconds)


def test_errors_are_statuses_and_give_nothing_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            echo = channel.unary_unary(f"/{NAME}/Echo")
            missing = await failure(echo(b"missing"))
            assert (missing.code(), missing.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
            full = await failure(echo(b"full"))
            assert (full.code(), retry_after_s(full)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 3)
            by_hand = await failure(echo(b"abort"))
            assert (by_hand.code(), by_hand.details()) == (grpc.StatusCode.ALREADY_EXISTS, "by hand")
            bug = await failure(echo(b"bug"))
            assert bug.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in str(bug)
        for code in ("NOT_FOUND", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "INTERNAL"):
            assert host.count(code) == 1, code

    with caplog.at_level(logging.INFO):
        run(tmp_path, test)
    traces = [getattr(record, "trace", "") for record in caplog.records]
    assert any("ZeroDivisionError: secret" in trace for trace in traces)


def test_streams_fail_politely_too(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            count = channel.unary_stream(f"/{NAME}/Count")
            assert [part async for part in count(b"")] == [b"0", b"1", b"2"]
            call = count(b"missing")
            assert [await call.read() for _ in range(3)] == [b"0", b"1", b"2"]
            assert (await failure(call.read())).code() == grpc.StatusCode.NOT_FOUND
        assert (host.count("OK", "Count"), host.count("NOT_FOUND", "Count")) == (1, 1)

    run(tmp_path, test)


def test_calls_under_way_are_finished(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            slow = asyncio.ensure_future(channel.unary_unary(f"/{NAME}/Echo")(b"slow"))
            await asyncio.sleep(0.1)
            host.stop.set()
            assert await slow == b"slow"

    run(tmp_path, test, grace_s=5)


def test_calls_that_outlast_the_grace_are_cut(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            slow = asyncio.ensure_future(channel.unary_unary(f"/{NAME}/Echo")(b"slow"))
            await asyncio.sleep(0.1)
            host.stop.set()
            assert (await failure(slow)).code() == grpc.StatusCode.UNAVAILABLE
        assert host.count("CANCELLED") == 1

    run(tmp_path, test, grace_s=0.05)


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
