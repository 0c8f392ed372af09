"""grpc.health.v1: which services answer.

Not grpc-health-checking's servicer: there, the first watcher that leaves takes the bell of all others with it, and they
never hear that the service is about to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.service.errors import NotFound
from common.service.status import shortened, status_of

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


LIVENESS, READINESS = "liveness", "readiness"


class Health(health_pb2_grpc.HealthServicer):
    """Answers Check and Watch by service name; "" is the whole server. It begins as NOT_SERVING.

    Two names are for probes: "readiness" is the whole server again, "liveness" says SERVING for as long as the process
    answers at all: what it depends on is no reason to start it anew.
    """

    def __init__(self) -> None:
        self._is_serving: dict[str, bool] = {"": False, READINESS: False}
        self._is_usable: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._when_ending: list[Callable[[], object]] = []

    def set_serving(self, names: Iterable[str]) -> None:
        """The services of these names answer from now on."""
        self._is_serving |= dict.fromkeys((READINESS, *names), True)
        self._ring()

    def set_all_not_serving(self) -> None:
        """None of them does: the service is about to end."""
        self._is_serving = dict.fromkeys(self._is_serving, False)
        self._ring()
        for tell in self._when_ending:
            tell()

    def when_ending(self, tell: Callable[[], object]) -> None:
        """`tell` is called when the service is about to end, while calls are still under way and taken."""
        self._when_ending.append(tell)

    def set_usable(self, usable: bool, *, dependency: str = "") -> None:
        """Whether something that the services depend on can be used; while one of these cannot, none of them answers."""
        self._is_usable[dependency] = usable
        self._ring()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Whether a service answers; NOT_FOUND for a name that is none of ours."""
        if self._status(request.service) == _UNKNOWN:
            status = status_of(NotFound(f"service: {shortened(request.service)!r} is not served here"))
            await context.abort(status.code, status.details, status.trailing_metadata)
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The same now and whenever it changes."""
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, name: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if name == LIVENESS:
            return _SERVING
        if name not in self._is_serving:
            return _UNKNOWN
        return _SERVING if self._is_serving[name] and all(self._is_usable.values()) else _NOT_SERVING

    def _ring(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
