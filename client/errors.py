"""Reading back what a service said about a failed call: the google.rpc details of a gRPC error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

M = TypeVar("M", bound=Message)

DETAILS_KEY = "grpc-status-details-bin"  # gRPC's name of the trailing metadata that holds google.rpc.Status


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One field of a request that was refused, and why."""

    field: str
    description: str


class ServiceFailed(Exception):
    """A service refused a request or failed.

    Attributes:
        code: the gRPC status code's name, e.g. `INVALID_ARGUMENT`.
        description: what the service says.
        reason: what went wrong, for programs, e.g. `FIELD_INVALID`; empty where it is not said.
        violations: the fields that an INVALID_ARGUMENT names.
        retry_after_s: when the service asks to be tried again; None where it does not say.
    """

    def __init__(
        self,
        code: str,
        description: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {description}")
        self.code = code
        self.description = description
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: grpc.RpcError) -> Self:
        """What a failed call says."""
        said: Any = error
        return cls(
            said.code().name,
            said.details() or "",
            reason=reason(error),
            violations=violations(error),
            retry_after_s=retry_after_s(error),
        )


def violations(error: grpc.RpcError) -> tuple[Violation, ...]:
    """The fields that an INVALID_ARGUMENT error names (google.rpc.BadRequest); empty where it names none."""
    return tuple(
        Violation(field=violation.field, description=violation.description)
        for bad_request in _details(error, error_details_pb2.BadRequest)
        for violation in bad_request.field_violations
    )


def reason(error: grpc.RpcError) -> str:
    """What went wrong, for programs (google.rpc.ErrorInfo.reason, UPPER_SNAKE); empty where it is not said."""
    return next((info.reason for info in _details(error, error_details_pb2.ErrorInfo)), "")


def retry_after_s(error: grpc.RpcError) -> float | None:
    """Seconds after which the service asks to be tried again (google.rpc.RetryInfo); None: not said."""
    for retry in _details(error, error_details_pb2.RetryInfo):
        return retry.retry_delay.ToNanoseconds() / 1e9
    return None


def _details(error: grpc.RpcError, kind: type[M]) -> list[M]:
    trailing = getattr(error, "trailing_metadata", lambda: None)() or ()
    found: list[M] = []
    for key, value in trailing:
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            continue
        for packed in status.details:
            message = kind()
            if packed.Unpack(message):
                found.append(message)
    return found
