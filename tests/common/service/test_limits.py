"""What a call may take: room, bytes, time; and that every refusal says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.errors import reason, retry_after_s
from common.service.interceptor import CallLimits
from tests.common.service.echo import NAME, Host, failure, run

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_large_requests_are_refused(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            for size in (1001, 100_000):  # the second is more than the transport takes: no details then
                refused = await failure(channel.unary_unary(f"/{NAME}/Echo")(b"x" * size))
                assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert reason(refused) == ("REQUEST_TOO_LARGE" if size == 1001 else "")
            assert await channel.unary_unary(f"/{NAME}/Echo")(b"x" * 1000) == b"x" * 1000

    run(tmp_path, test, max_request_bytes=1000)


def test_what_is_no_message_is_refused(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            refused = await failure(channel.unary_unary(f"/{NAME}/Parsed")(b"\xff"))
            assert (refused.code(), reason(refused)) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")

    run(tmp_path, test)


def test_calls_beyond_the_limit_are_refused_at_once(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            echo, chat = channel.unary_unary(f"/{NAME}/Echo"), channel.stream_stream(f"/{NAME}/Chat")
            talking = [chat(), chat()]
            for call in talking:
                await call.write(b"hello")
                assert await call.read() == b"hello"
            for _ in range(20):
                refused = await failure(echo(b"more"))
                assert (refused.code(), reason(refused)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
                assert retry_after_s(refused) == 0.5
            for call in talking:
                call.cancel()
            await asyncio.sleep(0.1)
            both = await asyncio.gather(echo(b"slow"), echo(b"slow"))
            assert both == [b"slow", b"slow"], "a cancelled call gives its place back"

    run(tmp_path, test, max_concurrent_calls=2)


def test_deadlines(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            for method in ("Echo", "Count"):
                echo: Any = channel.unary_unary(f"/{NAME}/Echo") if method == "Echo" else _drained(channel)
                for timeout_s in (None, 100.0):
                    late = await failure(echo(b"slow", timeout=timeout_s))
                    assert (late.code(), reason(late)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
                assert await echo(b"quick") is not None
            own = await failure(channel.unary_unary(f"/{NAME}/Echo")(b"own timeout"))
            assert own.code() == grpc.StatusCode.INTERNAL, "a time-out of our own is no deadline of the caller's"
            early = await failure(channel.unary_unary(f"/{NAME}/Echo")(b"slow", timeout=0.05))
            assert early.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)
        assert host.count("DEADLINE_EXCEEDED") == 3
        assert host.count("DEADLINE_EXCEEDED", "Count") == 2

    run(tmp_path, test, default_deadline_s=0.1, max_deadline_s=0.2)


def _drained(channel: grpc.aio.Channel) -> Any:
    async def call(request: bytes, timeout: float | None = None) -> list[bytes]:
        return [part async for part in channel.unary_stream(f"/{NAME}/Count")(request, timeout=timeout)]

    return call


@pytest.mark.parametrize(
    ("default_s", "max_s", "remaining_s", "deadline_s"),
    [
        (0, 0, None, None),
        (0, 0, 5, 5),
        (3, 0, None, 3),
        (3, 0, 5, 5),
        (0, 4, None, 4),
        (3, 4, None, 3),
        (3, 4, 100, 4),
        (3, 4, 1, 1),
    ],
)
def test_the_shortest_deadline_counts(
    default_s: float, max_s: float, remaining_s: float | None, deadline_s: float | None
) -> None:
    limits = CallLimits(max_concurrent=1, max_request_bytes=1, default_deadline_s=default_s, max_deadline_s=max_s)
    assert limits.deadline_s(remaining_s) == deadline_s


def test_streams_both_ways(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            chat = channel.stream_stream(f"/{NAME}/Chat")

            async def requests(*parts: bytes) -> AsyncIterator[bytes]:
                for part in parts:
                    yield part

            assert [answer async for answer in chat(requests(b"a", b"slow", b"c"))] == [b"a", b"slow", b"c"]
            call = chat(requests(b"a", b"missing"))
            assert await call.read() == b"a"
            missing = await failure(call.read())
            assert (missing.code(), reason(missing)) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
            large = await failure(chat(requests(b"x" * 1001)).read())
            assert reason(large) == "REQUEST_TOO_LARGE"
        assert (host.count("OK", "Chat"), host.count("NOT_FOUND", "Chat")) == (1, 1)

    run(tmp_path, test, max_request_bytes=1000, default_deadline_s=0.01)


def test_unknown_methods_share_one_label(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            for number in range(3):
                await failure(channel.unary_unary(f"/{NAME}/Method{number}")(b""))
                await failure(channel.stream_stream(f"/other.Service/Method{number}")().read())
        assert host.count("UNIMPLEMENTED", "other") == 6

    run(tmp_path, test)


def test_every_watcher_hears_of_the_end(tmp_path: Path) -> None:
    """Also when another one has left; calls that come meanwhile are still answered."""

    async def test(host: Host) -> None:
        async with host.running() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", NAME, NAME)]
            assert [(await watch.read()).status for watch in watches] == [NOT_SERVING, UNKNOWN, UNKNOWN]
            await host.open()
            assert [(await watch.read()).status for watch in watches] == [SERVING] * 3
            watches.pop().cancel()
            await asyncio.sleep(0.05)
            host.stop.set()
            assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 2
            assert await channel.unary_unary(f"/{NAME}/Echo")(b"meanwhile") == b"meanwhile"
            nobody = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
            assert (nobody.code(), reason(nobody)) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")

    run(tmp_path, test, drain_delay_s=0.5)
