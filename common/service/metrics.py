"""What every service counts about its calls, for Prometheus: the names of gRFC A66, which gRPC's own instruments bear."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from common.version import VERSION

# Fewer than A66 advises: with its 41 the methods and statuses of one service would be thousands of series.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RpcMetrics:
    """Calls begun by method, their time by method and status, how many are under way. `grpc_method` has no slash before it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.started = Counter(
            "grpc_server_call_started", "Calls that have begun.", ("grpc_method",), registry=registry
        )
        self.duration_s = Histogram(
            "grpc_server_call_duration_seconds",
            "Time from a call's arrival to its status; the count is that of the calls that have ended.",
            ("grpc_method", "grpc_status"),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "reimagen_server_calls_in_flight", "Calls under way.", ("grpc_method",), registry=registry
        )


def process_registry(service: str, *, revision: str) -> CollectorRegistry:
    """A registry that says which build runs and holds the process's own figures (CPU, memory, files); services add theirs."""
    disable_created_metrics()  # a second series beside each, which nobody asks for
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    build = Gauge(
        "reimagen_build_info", "1; the labels say what runs.", ("service", "version", "revision"), registry=registry
    )
    build.labels(service, VERSION, revision).set(1)
    return registry


class MetricsEndpoint:
    """Serves a registry over HTTP at `/metrics` until closed."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Listen on `host`:`port`.

        Raises:
            OSError: the port is taken or not ours to take.
        """
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
