"""What happens around every call: readiness, errors to statuses, counts, one log line."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio

from common.service.errors import ServiceError, Unavailable
from common.service.metrics import RpcMetrics
from common.service.status import status_of

_INFRASTRUCTURE = "/grpc."  # health and reflection: always answered, neither counted nor logged

log = logging.getLogger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the unary and the server-streaming methods of our services.

    Until `ready` is set, their calls are answered UNAVAILABLE, so that a caller's retry policy waits for the
    start. `idle` is set while no call is under way.
    """

    def __init__(self, metrics: RpcMetrics) -> None:
        self.ready = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._num_in_flight = 0
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Give the handler of a call, wrapped."""
        method: str = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_INFRASTRUCTURE):
            return handler
        if not self.ready:
            return grpc.unary_unary_rpc_method_handler(self._refuse)
        if handler is None:
            return None
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            assert inspect.iscoroutinefunction(handler.unary_unary), f"{method} must be a coroutine function"
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)
        if handler.unary_stream:
            assert inspect.isasyncgenfunction(handler.unary_stream), f"{method} must be an async generator function"
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        raise AssertionError(f"{method}: calls that stream requests are not wrapped yet")

    async def _refuse(self, request: Any, context: grpc.aio.ServicerContext) -> NoReturn:
        await _abort(context, Unavailable("the service is starting", retry_after_s=1))

    def _unary(self, method: str, inner: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            with self._observe(method, context):
                try:
                    return await inner(request, context)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await _fail(method, context, error)

        return call

    def _stream(self, method: str, inner: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            with self._observe(method, context):
                try:
                    async for response in inner(request, context):
                        yield response
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    await _fail(method, context, error)

        return call

    @contextmanager
    def _observe(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        started = time.perf_counter()
        in_flight = self._metrics.in_flight.labels(method)
        in_flight.inc()
        self._num_in_flight += 1
        self.idle.clear()
        code = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED.name
            raise
        except grpc.aio.AbortError:
            code = _name(context.code())
            raise
        finally:
            elapsed_s = time.perf_counter() - started
            in_flight.dec()
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self.idle.set()
            self._metrics.requests.labels(method, code).inc()
            self._metrics.latency_s.labels(method).observe(elapsed_s)
            log.info("call", extra={"method": method, "code": code, "latency_ms": round(elapsed_s * 1e3, 2)})


async def _fail(method: str, context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    if not isinstance(error, ServiceError):
        log.error("call failed", extra={"method": method}, exc_info=error)
    await _abort(context, error)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    status = status_of(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _name(code: Any) -> str:
    """The name of a status code, which grpc.aio gives as an enum or as its number."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN.name)
