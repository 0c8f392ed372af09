"""Connections to a service: whom to trust, who calls, and what is tried again."""

from __future__ import annotations

import json
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM of the connection: the authorities to trust (empty: the system's), and the client's own certificate and key."""

    roots: bytes = b""
    certificate: bytes = b""
    key: bytes = b""


def open_channel(address: str, *, tls: Tls | None, max_response_bytes: int, retries: str = "{}") -> grpc.Channel:
    """A channel that connects at the first call.

    Args:
        address: unix:/path or host:port.
        tls: None: in the clear.
        max_response_bytes: largest answer taken.
        retries: a service configuration, e.g. of `retried`.
    """
    options = (("grpc.max_receive_message_length", max_response_bytes), ("grpc.service_config", retries))
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(tls.roots or None, tls.key or None, tls.certificate or None)
    return grpc.secure_channel(address, credentials, options=options)


def bearer(api_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a key; none for an empty one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def retried(*methods: tuple[str, str]) -> str:
    """A service configuration that tries (service, method) again while the service is away (UNAVAILABLE)."""
    names = [{"service": service, "method": method} for service, method in methods]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})
