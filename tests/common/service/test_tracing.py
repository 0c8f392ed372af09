"""Spans of calls, sent to a collector over a real socket; and none where no collector is set."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from common.service.config import ConfigError
from common.service.tracing import Tracing, trace_metadata
from tests.common.service import echo
from tests.common.service.echo import NAME, Host, failure, run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENTED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)


class Collector(pb_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.requests: list[pb.ExportTraceServiceRequest] = []

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        self.requests.append(request)
        return pb.ExportTraceServiceResponse()

    @property
    def spans(self) -> list:
        return [
            s for r in self.requests for resource in r.resource_spans for sc in resource.scope_spans for s in sc.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        pb_grpc.add_TraceServiceServicer_to_server(made, server)
        made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(0).wait()


def attributes(span: object) -> dict[str, str]:
    return {a.key: a.value.string_value for a in span.attributes}  # type: ignore[attr-defined]


def test_each_call_is_a_span_of_its_callers_trace(
    tmp_path: Path, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="common.service.interceptor")

    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            call = channel.unary_unary(f"/{NAME}/Echo")
            assert await call(b"a secret word", metadata=PARENTED) == b"a secret word"
            await failure(call(b"bug", metadata=PARENTED))
            await failure(call(b"missing"))
            counted = channel.unary_stream(f"/{NAME}/Count")(b"", metadata=PARENTED)
            assert [answer async for answer in counted] == [b"0", b"1", b"2"]
            await failure(channel.unary_unary("/nobody/knows")(b""))
            left = channel.unary_stream(f"/{NAME}/Count")(b"slow")
            await left.read()
            left.cancel()

    run(tmp_path, test, trace_endpoint=collector.endpoint)
    spans = {(span.name, attributes(span)["rpc.response.status_code"]): span for span in collector.spans}
    assert set(spans) >= {
        (f"{NAME}/Echo", "OK"),
        (f"{NAME}/Echo", "INTERNAL"),
        (f"{NAME}/Echo", "NOT_FOUND"),
        (f"{NAME}/Count", "OK"),
        ("other", "UNIMPLEMENTED"),
    }
    for key in ((f"{NAME}/Echo", "OK"), (f"{NAME}/Count", "OK")):
        assert (spans[key].trace_id.hex(), spans[key].parent_span_id.hex()) == (TRACE, PARENT)
        assert attributes(spans[key])["rpc.method"] == key[0]
    assert spans[f"{NAME}/Echo", "NOT_FOUND"].trace_id.hex() != TRACE
    codes = {key: span.status.code for key, span in spans.items()}
    assert (codes[f"{NAME}/Echo", "INTERNAL"], codes[f"{NAME}/Echo", "NOT_FOUND"]) == (2, 0), (
        "the caller's fault is none"
    )
    assert b"secret" not in b"".join(request.SerializeToString() for request in collector.requests)
    lines = [record for record in caplog.records if getattr(record, "trace_id", "") == TRACE]
    assert len(lines) == 3, "the log names the trace"


def test_what_is_called_from_a_call_is_told_the_trace(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[tuple[str, str], ...]] = []
    inner = echo.echo

    async def forwarding(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        told.append(trace_metadata())
        return await inner(request, context)

    monkeypatch.setattr(echo, "echo", forwarding)

    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            await channel.unary_unary(f"/{NAME}/Echo")(b"x", metadata=PARENTED)

    run(tmp_path, test, trace_endpoint=collector.endpoint)
    ((name, value),) = told[0]
    assert name == "traceparent" and value.split("-")[1] == TRACE
    (span,) = collector.spans
    assert value.split("-")[2] == span.span_id.hex()
    assert trace_metadata() == ()
    run(tmp_path, test)
    assert told[1] == (), "without an endpoint nothing is added"


@pytest.mark.parametrize(("ratio", "metadata", "num"), [(0.0, (), 0), (0.0, PARENTED, 1), (1.0, UNSAMPLED, 0)])
def test_the_caller_decides_and_else_the_ratio(
    tmp_path: Path, collector: Collector, ratio: float, metadata: tuple, num: int
) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            await channel.unary_unary(f"/{NAME}/Echo")(b"x", metadata=metadata)

    run(tmp_path, test, trace_endpoint=collector.endpoint, trace_sample_ratio=ratio)
    assert len(collector.spans) == num


def test_a_collector_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            assert await channel.unary_unary(f"/{NAME}/Echo")(b"x") == b"x"

    started = time.monotonic()
    run(tmp_path, test, trace_endpoint="http://127.0.0.1:1")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"endpoint": "collector:4317"}, "--trace-endpoint: 'collector:4317' is not http"),
        ({"sample_ratio": 1.5}, "--trace-sample-ratio: 1.5 is not between"),
        ({"sample_ratio": float("nan")}, "--trace-sample-ratio: nan"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, named: str) -> None:
    given = {"service": "x", "endpoint": "http://x:1", "sample_ratio": 1.0, "revision": "", **settings}
    with pytest.raises(ConfigError, match=named):
        Tracing(**given)


def test_without_an_endpoint_no_thread_of_an_exporter_runs(tmp_path: Path) -> None:
    async def test(host: Host) -> None:
        async with host.running():
            await host.open()
            assert not [thread for thread in threading.enumerate() if "otel" in thread.name.lower()]

    run(tmp_path, test)
