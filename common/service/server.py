"""One way to run a service: a grpc.aio server with health, reflection, metrics, limits and an orderly end."""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from common.service.config import ConfigError, setting
from common.service.health import SERVICE_NAME as HEALTH_NAME
from common.service.health import Health
from common.service.interceptor import CallInterceptor, CallLimits
from common.service.keys import ApiKeys
from common.service.metrics import MetricsEndpoint, RpcMetrics
from common.service.tls import TlsFiles
from common.service.tracing import Tracing

UNIX = "unix:"
_MAX_UNIX_PATH_BYTES = 107  # sun_path of sockaddr_un is 108 bytes on Linux, with the closing zero
_FLUSH_S = 0.1
_BACKSTOP = 2  # times the largest request that is taken
_MAX_PORT = 65535
_MAX_AGE_S = 86_400
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Opened = Callable[[grpc.aio.Server], AbstractAsyncContextManager[Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What every service is told; a service adds its own fields in a subclass."""

    address: str = setting(default="127.0.0.1:50051", help="where to listen: unix:/path or host:port (port 0: any)")
    metrics_port: int = setting(default=0, help="port of the Prometheus endpoint, on the same host; 0: none")
    max_concurrent_calls: int = setting(default=256, help="calls under way at once; more are RESOURCE_EXHAUSTED")
    max_request_bytes: int = setting(default=4 << 20, help="largest request taken, in bytes")
    max_response_bytes: int = setting(default=256 << 20, help="largest response sent, in bytes")
    default_deadline_s: float = setting(default=0.0, help="seconds that a call without a deadline gets; 0: no limit")
    max_deadline_s: float = setting(default=0.0, help="seconds that any call gets at most; 0: no limit")
    max_connection_age_s: float = setting(
        default=0.0,
        help="seconds after which a connection takes no new calls, so that its client looks names up and finds new replicas;"
        " calls under way end on it (gRPC, proposal A9); 0: for good",
    )
    drain_delay_s: float = setting(
        default=0.0, help="seconds after SIGTERM in which calls are still taken while health says NOT_SERVING"
    )
    grace_s: float = setting(default=10.0, help="seconds that calls under way get to end after SIGTERM or SIGINT")
    tls_certificate_file: Path | None = setting(  # noqa: RUF009 (a field, as are the next)
        default=None, help="PEM certificate chain; empty: no TLS"
    )
    tls_key_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM private key of the certificate"
    )
    tls_client_ca_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificates of authorities: clients must show a certificate of one; empty: need none"
    )
    read_keys_file: Path | None = setting(  # noqa: RUF009
        default=None, help="API keys, one a line, that may read; with no file of keys nobody is asked for one"
    )
    admin_keys_file: Path | None = setting(  # noqa: RUF009
        default=None, help="API keys, one a line, that may change things too"
    )
    revision: str = setting(default="unknown", help="revision of the source that runs, for reimagen_build_info")
    trace_endpoint: str | None = setting(
        default=None, help="http(s)://HOST:PORT of a collector of traces (OTLP over gRPC); empty: nothing is traced"
    )
    trace_sample_ratio: float = setting(
        default=1.0, help="part of the traces that begin here which is recorded; a caller's trace follows the caller"
    )
    parent_pid: int = setting(default=0, help="end when the process with this id, which started us, ends; 0: stay")
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        default="info", help="debug, info, warning or error"
    )
    log_style: Literal["json", "text"] = setting(default="json", help="json (one object a line) or text")

    def call_limits(self) -> CallLimits:
        """What a call may take."""
        return CallLimits(
            max_concurrent=self.max_concurrent_calls,
            max_request_bytes=self.max_request_bytes,
            default_deadline_s=self.default_deadline_s,
            max_deadline_s=self.max_deadline_s,
        )


async def serve(
    settings: ServerSettings,
    *,
    opened: Opened,
    registry: CollectorRegistry,
    name: str = "reimagen",
    admin_methods: frozenset[str] = frozenset(),
    announce: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
    health: Health | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; then finish the calls under way and return.

    The port is bound first, so that a taken one is told at once; health answers NOT_SERVING and calls
    UNAVAILABLE until `opened` has been entered.

    Args:
        settings: where to listen, and the limits.
        opened: called with the server, gives a context in which the services live: on entry it opens what
            they need, registers them, and gives their full names; on exit it closes what it opened.
        name: of the service, in traces.
        registry: where the counts of calls go, and what the metrics endpoint shows.
        admin_methods: full names ("/package.Service/Method") of methods that need an admin key, where keys are asked for.
        announce: called once, when serving, with the address a client dials; prints "ready ADDRESS" when not
            given.
        stop: ends the serving, for a host that has no signals.
        health: what health calls are answered from, for services that tell it of what they depend on.

    Raises:
        ConfigError: the address, the TLS files, the files of keys or the trace endpoint cannot be used.
        OSError: the metrics port is taken.
    """
    stop = stop or asyncio.Event()
    tracing = _tracing(settings, name)
    interceptor = CallInterceptor(
        RpcMetrics(registry),
        settings.call_limits(),
        keys=ApiKeys(read=settings.read_keys_file, admin=settings.admin_keys_file),
        admin_methods=admin_methods,
        tracing=tracing,
    )
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=(
            # Our own limit answers with details; this one, which cannot, keeps what is read into memory bounded.
            ("grpc.max_receive_message_length", _BACKSTOP * settings.max_request_bytes),
            ("grpc.max_send_message_length", settings.max_response_bytes),
            # Without this a second server on the same port starts well and takes half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 20_000),  # a client may ping while it waits in line
            *_connection_age(settings.max_connection_age_s),
        ),
    )
    checker = health or Health()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    host, address = _bind(server, settings)
    async with AsyncExitStack() as stack:
        if tracing:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        if settings.metrics_port:
            endpoint = MetricsEndpoint(registry, host=host, port=settings.metrics_port)
            stack.callback(endpoint.close)
        _stop_on_signals(stop, stack)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        names = await stack.enter_async_context(opened(server))
        reflection.enable_server_reflection((*names, HEALTH_NAME, reflection.SERVICE_NAME), server)
        interceptor.ready = True
        checker.set_serving(("", *names))
        (announce or _print_ready)(address)
        await stop.wait()
        checker.set_all_not_serving()
        await asyncio.sleep(settings.drain_delay_s)  # balancers learn of it; what they still send is answered
        await _drain(server, interceptor.idle, settings.grace_s)


def die_with_parent(parent_pid: int) -> None:
    """Ask Linux for a SIGTERM to this process when the one that started it ends, however it ends (prctl(2)).

    The kernel watches the *thread* that started us: a parent starts its children from a thread that lives as
    long as it does. Elsewhere than on Linux this does nothing.

    Raises:
        ConfigError: `parent_pid` is not the process that started this one; it may have ended already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # asked after prctl: a parent that ends from now on is noticed
        raise ConfigError(f"--parent-pid: {parent_pid} did not start this process, or has ended")


def _connection_age(seconds: float) -> list[tuple[str, int]]:
    if not 0 <= seconds <= _MAX_AGE_S:
        raise ConfigError(f"max_connection_age_s: {seconds} is not between 0 and {_MAX_AGE_S}")
    return [("grpc.max_connection_age_ms", math.ceil(1000 * seconds))] if seconds else []


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> tuple[str, str]:
    """Bind; gives the host for other endpoints, and the address to dial with a real port in it."""
    address = settings.address
    tls = TlsFiles.of(settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
    if address.startswith(UNIX):
        path = Path(address.removeprefix(UNIX))
        if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
            raise ConfigError(f"address: {address!r} is longer than a Unix socket's path can be")
        if not path.parent.is_dir():
            raise ConfigError(f"address: the folder of {address!r} does not exist")
    else:
        host, colon, number = address.rpartition(":")
        if not (host and colon and number.isdecimal() and int(number) <= _MAX_PORT):  # gRPC takes any number
            raise ConfigError(f"address: {address!r} is neither unix:/path nor host:port")
    credentials = tls.credentials() if tls else None
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigError(f"address: cannot listen on {address!r} (taken, not permitted, or no such host)") from None
    if address.startswith(UNIX):
        return "127.0.0.1", address
    host = address.rpartition(":")[0]
    return host.strip("[]"), f"{host}:{port}"


def _tracing(settings: ServerSettings, name: str) -> Tracing | None:
    if not settings.trace_endpoint:
        return None
    return Tracing(
        service=name,
        endpoint=settings.trace_endpoint,
        sample_ratio=settings.trace_sample_ratio,
        revision=settings.revision,
    )


async def _drain(server: grpc.aio.Server, idle: asyncio.Event, grace_s: float) -> None:
    """Refuse new calls and finish those under way, but wait for no client that merely stays connected."""
    stopping = asyncio.create_task(server.stop(grace_s))
    with suppress(TimeoutError):
        await asyncio.wait_for(idle.wait(), grace_s)
    # A last answer may still be on its way out: `stop` alone knows, and most often it is done by now.
    await asyncio.wait({stopping}, timeout=min(grace_s, _FLUSH_S))
    await server.stop(0)
    await stopping
    with suppress(TimeoutError):  # calls that were cut are cancelled, and counted, a moment later
        await asyncio.wait_for(idle.wait(), _FLUSH_S)


def _stop_on_signals(stop: asyncio.Event, stack: AsyncExitStack) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except (RuntimeError, ValueError):  # only the main thread may; a host elsewhere gives `stop`
            return
        stack.callback(loop.remove_signal_handler, number)


def _print_ready(address: str) -> None:
    print(f"ready {address}", flush=True)
