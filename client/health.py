"""Whether services answer (grpc.health.v1)."""

from __future__ import annotations

from dataclasses import dataclass

from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.call import Call
from client.errors import ServiceFailed

TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ServiceHealth:
    """One service.

    Attributes:
        service: its full name, e.g. `reimagen.generator.v1.GeneratorService`.
        address: where it was asked.
        status: `SERVING`, `NOT_SERVING`, or the gRPC status code of a check that failed, e.g. `UNAVAILABLE`.
        reason: why the check failed; else empty.
    """

    service: str
    address: str
    status: str
    reason: str = ""

    @property
    def is_serving(self) -> bool:
        """Whether it answers."""
        return self.status == "SERVING"


def check_call(service: str, address: str) -> Call[ServiceHealth]:
    """Asks for one service."""

    def read(response: health_pb2.HealthCheckResponse) -> ServiceHealth:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return ServiceHealth(service=service, address=address, status=status)

    return Call(
        stub=health_pb2_grpc.HealthStub,
        method="Check",
        request=health_pb2.HealthCheckRequest(service=service),
        read=read,
        may_repeat=False,
    )


def unanswered(service: str, address: str, failure: ServiceFailed) -> ServiceHealth:
    """What a check that failed says."""
    return ServiceHealth(service=service, address=address, status=failure.code, reason=failure.description)
