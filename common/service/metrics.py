"""What every service counts about its calls, for Prometheus."""

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
    start_http_server,
)

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class RpcMetrics:
    """Counts of calls by method and status code, their latency, and how many are under way."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "reimagen_rpc_requests",
            "Calls answered, by gRPC status code.",
            ("method", "code"),
            registry=registry,
        )
        self.latency_s = Histogram(
            "reimagen_rpc_latency_seconds",
            "Time from a call's arrival to its status.",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge("reimagen_rpc_in_flight", "Calls under way.", ("method",), registry=registry)


def process_registry() -> CollectorRegistry:
    """A registry that holds this process's own figures (CPU, memory, files); services add theirs."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
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
