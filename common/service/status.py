"""Exceptions to gRPC statuses: code, message and google.rpc details (AIP-193)."""

from __future__ import annotations

from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import Status, StatusCode
from grpc_status import rpc_status

from common.service.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServiceError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)

DOMAIN = "reimagen"  # of google.rpc.ErrorInfo: whose reasons these are
MAX_MESSAGE_BYTES = 600  # a status travels in HTTP/2 trailers of at most 8 KiB: thrice, and once in percent-encoding

_OURS = "internal error; the service's log has the cause"
_CODES: dict[type[ServiceError], StatusCode] = {
    InvalidArgument: StatusCode.INVALID_ARGUMENT,
    NotFound: StatusCode.NOT_FOUND,
    AlreadyExists: StatusCode.ALREADY_EXISTS,
    Unauthenticated: StatusCode.UNAUTHENTICATED,
    PermissionDenied: StatusCode.PERMISSION_DENIED,
    FailedPrecondition: StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: StatusCode.UNAVAILABLE,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: StatusCode.UNIMPLEMENTED,
    DataLoss: StatusCode.DATA_LOSS,
}


def code_of(error: BaseException) -> StatusCode:
    """The status code that `error` is answered with; INTERNAL for anything that is not a `ServiceError`."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), StatusCode.INTERNAL)


def message_of(error: BaseException) -> str:
    """What the caller is told. The message of an exception that is not a `ServiceError` is not given away."""
    return shortened(error.description) if isinstance(error, ServiceError) else _OURS


def shortened(text: str) -> str:
    """`text`, or its beginning where it is too long for a status."""
    whole = text.encode("utf-8", "replace")
    return text if len(whole) <= MAX_MESSAGE_BYTES else whole[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


def status_of(error: BaseException) -> Status:
    """The whole gRPC status of `error`: code, message, and trailing metadata with google.rpc details.

    ErrorInfo is always there; BadRequest names the fields of an `InvalidArgument`; RetryInfo says when to come again.
    """
    status = status_pb2.Status(code=code_of(error).value[0], message=message_of(error))
    reason = error.reason if isinstance(error, ServiceError) else ServiceError.default_reason
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if isinstance(error, InvalidArgument):
        bad_request = error_details_pb2.BadRequest()
        for field, description in error.violations:
            bad_request.field_violations.add(field=shortened(field), description=shortened(description))
        status.details.add().Pack(bad_request)
    if isinstance(error, ResourceExhausted | Unavailable) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return rpc_status.to_status(status)
