"""A trace goes with a picture: from the program that asks, through the generator, to retrieval and to Triton."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider

from client.generator import GeneratorClient
from common.service.errors import ServiceError
from common.service.tracing import Tracing
from deploy.local.knowledge_base import LIBRARY
from generator_svc.triton_client import TritonClient
from generator_svc.triton_errors import EndpointFailed
from tests.common.service.test_tracing import Collector
from tests.generator_svc.asking import QUICK, draw
from tests.generator_svc.tiny_stack import Host, generator_service, retrieval_service

TIMEOUT_S = 30.0
TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("a program")


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
        made.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(0).wait()


@contextmanager
def stack(weights: Path, work: Path, folder: Path, **settings: Any) -> Iterator[str]:
    """The address of a generator that asks a retrieval service; they have told all spans at its end."""
    host = Host()
    retrieval = retrieval_service(work / LIBRARY, folder / "r.sock", **settings)
    try:
        with host.running(retrieval) as address:
            given = {"retrieval_address": address, "weights": weights, **settings}
            with host.running(generator_service(folder / "g.sock", **given)) as generator:
                yield generator
    finally:
        host.close()


def test_one_trace_goes_from_the_caller_to_retrieval(
    weights: Path, work: Path, tmp_path: Path, collector: Collector
) -> None:
    with stack(weights, work, tmp_path, trace_endpoint=collector.endpoint) as address:
        with GeneratorClient(address) as client, TRACER.start_as_current_span("a page") as page:
            draw(client, QUICK)
        assert page.get_span_context().is_valid
    spans = {span.name: span for span in collector.spans}
    generating = spans["reimagen.generator.v1.GeneratorService/Generate"]
    looking_up = spans["reimagen.retrieval.v1.RetrievalService/Retrieve"]
    context = page.get_span_context()
    assert generating.trace_id == looking_up.trace_id == context.trace_id.to_bytes(16, "big")
    assert generating.parent_span_id == context.span_id.to_bytes(8, "big")
    assert looking_up.parent_span_id == generating.span_id


class Told:
    """A server that stands for Triton: notes what it is told beside a request, and is away."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str]] = []

    def service(self, details: Any) -> Any:
        def refuse(_: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
            context.abort(grpc.StatusCode.UNAVAILABLE, "it is away")
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


@pytest.fixture
def triton() -> Iterator[tuple[str, Told]]:
    told = Told()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((told,))  # type: ignore[arg-type]
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield address, told
        server.stop(0).wait()


def test_triton_is_told_the_trace_where_there_is_one(triton: tuple[str, Told], collector: Collector) -> None:
    address, told = triton
    tracing = Tracing(service="generator", endpoint=collector.endpoint, sample_ratio=1.0, revision="")

    async def ask() -> None:
        client = TritonClient(address)
        tensors = {"x": np.zeros((1, 1), np.float32)}
        try:
            with pytest.raises((ServiceError, EndpointFailed)):
                await client.infer("text_encoder", tensors, timeout_s=TIMEOUT_S)
            with pytest.raises((ServiceError, EndpointFailed)):
                async for _ in client.stream("unet_64", tensors, timeout_s=TIMEOUT_S):
                    pass
        finally:
            await client.close()

    with tracing.call("/reimagen.generator.v1.GeneratorService/Generate", ()) as span:
        asyncio.run(ask())
    asyncio.run(ask())
    tracing.close()
    inside, outside = told.metadata[:2], told.metadata[2:]
    assert len(inside) == len(outside) == 2
    assert {each["traceparent"].split("-")[1] for each in inside} == {span.trace_id}
    assert not any("traceparent" in each for each in outside), "off where nothing is traced"
