"""What happens around every call: readiness, keys, limits, deadlines, errors to statuses, counts, one log line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import grpc.aio

from common.service.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unavailable,
    Unimplemented,
)
from common.service.keys import ApiKeys
from common.service.metrics import RpcMetrics
from common.service.redaction import redacted_trace
from common.service.status import status_of
from common.service.tracing import CallSpan, Tracing

START_RETRY_S = 1.0
OVERLOAD_RETRY_S = 0.5
_HEALTH = "/grpc.health.v1."  # probes and balancers have no keys, and are answered while we start and end
_INFRASTRUCTURE = "/grpc."  # health and reflection: neither counted nor logged
_NO_METHOD = "other"  # label of calls to methods that are not there: anybody can think of any number of them

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """What a call may take.

    Attributes:
        max_concurrent: calls under way at once.
        max_request_bytes: size of one request message.
        default_deadline_s: of a call that brings no deadline; 0: none. max_deadline_s: of any call; 0: none.
            Neither is for calls that stream both ways, which last as long as their caller has requests.
    """

    max_concurrent: int
    max_request_bytes: int
    default_deadline_s: float = 0.0
    max_deadline_s: float = 0.0

    def deadline_s(self, remaining_s: float | None) -> float | None:
        """Seconds that a call gets whose caller waits for `remaining_s` more (None: for ever)."""
        wanted = [seconds for seconds in (remaining_s or self.default_deadline_s, self.max_deadline_s) if seconds > 0]
        return min(wanted, default=None)


@dataclass(kw_only=True)
class _Call:
    """One call under way; `request` is the newest message that it brought."""

    method: str
    context: grpc.aio.ServicerContext
    request: Any = None
    started: float = field(default_factory=time.perf_counter)
    code: str = "OK"
    span: CallSpan | None = None


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of our services: unary, server-streaming, and streaming both ways.

    Until `ready` is set, their calls are answered UNAVAILABLE, so that a caller's retry policy waits for the
    start. `idle` is set while no call is under way.
    """

    def __init__(
        self,
        metrics: RpcMetrics,
        limits: CallLimits,
        *,
        keys: ApiKeys,
        admin_methods: frozenset[str] = frozenset(),
        tracing: Tracing | None = None,
    ) -> None:
        """`admin_methods` ("/package.Service/Method") need an admin key, where keys are asked for. `tracing` None: no spans."""
        self.ready = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._num_in_flight = 0
        self._metrics = metrics
        self._limits = limits
        self._keys = keys
        self._admin_methods = admin_methods
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Give the handler of a call, wrapped."""
        method: str = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_HEALTH):
            return handler
        refusal = self._refusal(method, handler, handler_call_details.invocation_metadata)
        if refusal is not None:
            return self._refuse(_NO_METHOD if handler is None else method, refusal)
        if method.startswith(_INFRASTRUCTURE):
            return handler
        # Messages are taken apart in the wrapper: what is too large or no message gets a proper status.
        if handler.unary_unary:
            wrapped = self._unary(method, handler.request_deserializer, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(wrapped, response_serializer=handler.response_serializer)
        if handler.unary_stream:
            wrapped = self._stream(method, handler.request_deserializer, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(wrapped, response_serializer=handler.response_serializer)
        assert handler.stream_stream, f"{method}: calls that stream requests for one answer are not wrapped"
        wrapped = self._both_ways(method, handler.request_deserializer, handler.stream_stream)
        return grpc.stream_stream_rpc_method_handler(wrapped, response_serializer=handler.response_serializer)

    def _refusal(self, method: str, handler: Any, metadata: Any) -> ServiceError | None:
        if not self.ready:
            return Unavailable("the service is starting", retry_after_s=START_RETRY_S, reason="STARTING")
        try:
            self._keys.check(metadata or (), needs_admin=method in self._admin_methods)
        except ServiceError as error:
            return error
        return Unimplemented(f"there is no method {method}") if handler is None else None

    def _refuse(self, label: str, refusal: ServiceError) -> Any:
        async def call(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._observe(_Call(method=label, context=context)):
                raise refusal
            yield  # an async generator, which is what a call that streams is

        return grpc.stream_stream_rpc_method_handler(call)  # reads no request, so it answers whatever is sent

    def _unary(self, method: str, decode: Any, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext) -> Any:
            call = _Call(method=method, context=context)
            async with self._observe(call), self._limited(call):
                call.request = self._decoded(decode, raw)
                return await inner(call.request, context)

        return answer

    def _stream(self, method: str, decode: Any, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            call = _Call(method=method, context=context)
            async with self._observe(call), self._limited(call):
                call.request = self._decoded(decode, raw)
                async for response in inner(call.request, context):
                    yield response

        return answer

    def _both_ways(self, method: str, decode: Any, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
        async def answer(raws: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            call = _Call(method=method, context=context)

            async def requests() -> AsyncIterator[Any]:
                async for raw in raws:
                    call.request = self._decoded(decode, raw)
                    yield call.request

            async with self._observe(call), self._limited(call, deadline=False):
                async for response in inner(requests(), context):
                    yield response

        return answer

    def _decoded(self, decode: Callable[[bytes], Any] | None, raw: bytes) -> Any:
        limit = self._limits.max_request_bytes
        if len(raw) > limit:
            text = f"the request has {len(raw)} bytes; at most {limit} are taken"
            raise ResourceExhausted(text, reason="REQUEST_TOO_LARGE")
        if decode is None:
            return raw
        try:
            return decode(raw)
        except Exception:  # protobuf's DecodeError: whatever it is, these bytes are no message
            raise InvalidArgument("request", "is not a message of this method", reason="REQUEST_MALFORMED") from None

    @asynccontextmanager
    async def _limited(self, call: _Call, *, deadline: bool = True) -> AsyncIterator[None]:
        """Room for one more, and an end to the waiting."""
        if self._num_in_flight > self._limits.max_concurrent:  # this call is counted already
            raise ResourceExhausted(
                f"{self._limits.max_concurrent} calls are under way; no more are taken at once",
                retry_after_s=OVERLOAD_RETRY_S,
                reason="TOO_MANY_CALLS",
            )
        limit_s = self._limits.deadline_s(call.context.time_remaining()) if deadline else None
        try:
            async with asyncio.timeout(limit_s) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(f"the call took longer than the {limit_s:.3g} s that it has") from None

    @asynccontextmanager
    async def _observe(self, call: _Call) -> AsyncIterator[None]:
        metadata: Any = call.context.invocation_metadata() or ()
        with self._tracing.call(call.method, metadata) if self._tracing else nullcontext() as call.span:
            async with self._counted(call):
                yield

    @asynccontextmanager
    async def _counted(self, call: _Call) -> AsyncIterator[None]:
        label = call.method.removeprefix("/")
        in_flight = self._metrics.in_flight.labels(label)
        self._metrics.started.labels(label).inc()
        in_flight.inc()
        self._num_in_flight += 1
        self.idle.clear()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            call.code = "DEADLINE_EXCEEDED" if _is_late(call.context) else "CANCELLED"
            raise
        except grpc.aio.AbortError:
            call.code = _name(call.context.code())
            raise
        except Exception as error:
            call.code = status_of(error).code.name
            if not isinstance(error, ServiceError):
                trace = redacted_trace(error, call.request)
                log.error("call failed", extra={"method": call.method, "trace": trace})
            await _abort(call.context, error)
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self.idle.set()
            in_flight.dec()
            self._count(call)

    def _count(self, call: _Call) -> None:
        elapsed_s = time.perf_counter() - call.started
        self._metrics.duration_s.labels(call.method.removeprefix("/"), call.code).observe(elapsed_s)
        line = {"method": call.method, "code": call.code, "latency_ms": round(elapsed_s * 1e3, 2)}
        if call.span:
            call.span.end(call.code)
            line["trace_id"] = call.span.trace_id
        log.info("call", extra=line)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    status = status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _is_late(context: grpc.aio.ServicerContext) -> bool:
    remaining_s = context.time_remaining()
    return remaining_s is not None and remaining_s <= 0


def _name(code: Any) -> str:
    """The name of a status code, which grpc.aio gives as an enum or as its number."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN.name)
