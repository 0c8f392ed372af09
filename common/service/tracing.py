"""Traces: one span for each call, joined to the caller's by W3C trace context. Nothing is traced unless an endpoint is set.

Attributes follow OpenTelemetry's conventions for RPC. No span holds what a request says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry import context as contexts
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.service.config import ConfigError
from common.version import VERSION

EXPORT_TIMEOUT_S = 2.0  # what a collector that is away may cost the end of the process
_SERVER_FAULTS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, kw_only=True)
class CallSpan:
    """The span of one call; `trace_id` is hexadecimal, empty where it is not recorded."""

    span: Span
    trace_id: str

    def end(self, code: str) -> None:
        """The call has ended with this status code, by its name."""
        self.span.set_attribute("rpc.response.status_code", code)
        if code in _SERVER_FAULTS:
            self.span.set_status(StatusCode.ERROR)


class Tracing:
    """Makes spans, and sends them to a collector until closed."""

    def __init__(self, *, service: str, endpoint: str, sample_ratio: float, revision: str) -> None:
        """Send spans to `endpoint` (http://HOST:PORT or https://HOST:PORT, OTLP over gRPC).

        Args:
            sample_ratio: part of the traces that begin here which is recorded; those that a caller began follow the caller.

        Raises:
            ConfigError: the endpoint or the ratio cannot be.
        """
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--trace-endpoint: {endpoint!r} is not http://HOST:PORT or https://HOST:PORT")
        if not 0.0 <= sample_ratio <= 1.0:
            raise ConfigError(f"--trace-sample-ratio: {sample_ratio} is not between 0 and 1")
        told = {"service.name": service, "service.version": VERSION, "vcs.ref.head.revision": revision}
        self._provider = TracerProvider(
            resource=Resource(told), sampler=ParentBasedTraceIdRatio(sample_ratio), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=parts.scheme == "http", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("reimagen")

    @contextmanager
    def call(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[CallSpan]:
        """The span of a call to `method` ("/package.Service/Method") that came with this metadata."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        name = method.removeprefix("/")
        span = self._tracer.start_span(
            name,
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": name},
        )
        identity = span.get_span_context()
        before = contexts.get_current()
        contexts.attach(set_span_in_context(span))
        try:
            yield CallSpan(span=span, trace_id=format_trace_id(identity.trace_id) if span.is_recording() else "")
        finally:
            contexts.attach(before)  # not detach: a stream that is left may end in another context
            span.end()

    def close(self) -> None:
        """Send what has not been sent yet, if the collector takes it."""
        self._provider.shutdown()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What tells a service that is called which trace the call belongs to; nothing where no span is under way."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return tuple(carrier.items())
