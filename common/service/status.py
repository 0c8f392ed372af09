"""Exceptions to gRPC statuses: code, message and google.rpc details (AIP-193)."""

from __future__ import annotations

from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import Status, StatusCode
from grpc_status import rpc_status

from common.service.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)

_CODES: dict[type[ServiceError], StatusCode] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    NotFound: StatusCode.NOT_FOUND,
    FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: StatusCode.UNAVAILABLE,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    DataLoss: StatusCode.DATA_LOSS,
}


def code_of(error: BaseException) -> StatusCode:
    """The status code that `error` is answered with; INTERNAL for anything that is not a `ServiceError`."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), StatusCode.INTERNAL)


def status_of(error: BaseException) -> Status:
    """The whole gRPC status of `error`: code, message, and trailing metadata with google.rpc details.

    The message of an exception that is not a `ServiceError` is not given away.
    """
    code = code_of(error)
    message = (
        error.description if isinstance(error, ServiceError) else "internal error; the service's log has the cause"
    )
    status = status_pb2.Status(code=code.value[0], message=message)
    if isinstance(error, InvalidArgument):
        bad_request = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad_request.field_violations.add(field=field, description=description)
        status.details.add().Pack(bad_request)
    if isinstance(error, ResourceExhausted | Unavailable) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)
