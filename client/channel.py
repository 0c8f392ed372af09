"""Connections to a service: where it is, whom to trust, who calls."""

from __future__ import annotations

import json
from dataclasses import dataclass

import grpc
import grpc.aio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

KEEPALIVE_S = 60  # a peer that is gone without a word is noticed after this much silence and KEEPALIVE_TIMEOUT_S
KEEPALIVE_TIMEOUT_S = 20
MAX_RESPONSE_BYTES = 256 << 20  # the neighbors' files come in one message
_PROPAGATOR = TraceContextTextMapPropagator()
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM of the connection: the authorities to trust (empty: the system's), and the client's own certificate and key."""

    roots: bytes = b""
    certificate: bytes = b""
    key: bytes = b""

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC makes of it."""
        return grpc.ssl_channel_credentials(self.roots or None, self.key or None, self.certificate or None)


def open_channel(address: str, tls: Tls | None) -> grpc.Channel:
    """A channel that connects at the first call, and takes calls by turns to all addresses that are behind its own.

    Args:
        address: host:port or unix:/path; several replicas as dns:///host:port (every address of the name) or
            ipv4:address:port,address:port.
        tls: None: in the clear.
    """
    if tls is None:
        return grpc.insecure_channel(address, options=_options())
    return grpc.secure_channel(address, tls.credentials(), options=_options())


def open_async_channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    """The same for asyncio."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_options())
    return grpc.aio.secure_channel(address, tls.credentials(), options=_options())


def bearer(api_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a key; none for an empty one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def trace_context() -> tuple[tuple[str, str], ...]:
    """The metadata that joins a call to the trace of the program that makes it (W3C trace context); none where it traces
    nothing."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return tuple(carrier.items())


def _options() -> tuple[tuple[str, str | int], ...]:
    return (
        ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
        ("grpc.service_config", _ROUND_ROBIN),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_S),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_TIMEOUT_S),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: a request that waits in line sends and gets nothing
        ("grpc.enable_retries", 0),  # `client.retry` retries: it knows what may be repeated, and heeds RetryInfo
    )
