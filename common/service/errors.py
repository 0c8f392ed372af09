"""What goes wrong in a service, said without gRPC: the domain raises these, `status.py` maps them."""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """An error whose message may be shown to the caller. Any other exception is ours alone.

    Attributes:
        reason: what went wrong, for programs: UPPER_SNAKE, stable (google.rpc.ErrorInfo.reason).
    """

    default_reason: ClassVar[str] = "INTERNAL_ERROR"

    def __init__(self, description: str, *, reason: str = "") -> None:
        super().__init__(description)
        self.description = description
        self.reason = reason or self.default_reason


class InvalidArgument(ServiceError):
    """The request is wrong whatever the state of the service: `field` names the part, `description` why."""

    default_reason = "FIELD_INVALID"

    def __init__(self, field: str, description: str, *, reason: str = "") -> None:
        super().__init__(f"{field}: {description}", reason=reason)
        self.violations: tuple[tuple[str, str], ...] = ((field, description),)


class NotFound(ServiceError):
    """Something that the request names does not exist here."""

    default_reason = "NOT_FOUND"


class AlreadyExists(ServiceError):
    """Something that the request wants to make is there already."""

    default_reason = "ALREADY_EXISTS"


class Unauthenticated(ServiceError):
    """The caller has not said who it is, or not in a way that is known here."""

    default_reason = "API_KEY_INVALID"


class PermissionDenied(ServiceError):
    """The caller is known, and may not do this."""

    default_reason = "API_KEY_NOT_ADMIN"


class FailedPrecondition(ServiceError):
    """The request is well formed, but the service lacks what it needs: retrying does not help."""

    default_reason = "PRECONDITION_FAILED"


class ResourceExhausted(ServiceError):
    """A limit is reached (queue, quota); `retry_after_s` seconds later it may be worth another try."""

    default_reason = "LIMIT_REACHED"

    def __init__(self, description: str, *, retry_after_s: float | None = None, reason: str = "") -> None:
        super().__init__(description, reason=reason)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """The service, or one that it calls, cannot answer now; the caller may try again."""

    default_reason = "TEMPORARILY_UNAVAILABLE"

    def __init__(self, description: str, *, retry_after_s: float | None = None, reason: str = "") -> None:
        super().__init__(description, reason=reason)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServiceError):
    """The caller's deadline has passed, or leaves too little time for the work."""

    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(ServiceError):
    """There is no such method here."""

    default_reason = "METHOD_UNKNOWN"


class DataLoss(ServiceError):
    """Stored content is damaged; the description names it."""

    default_reason = "CONTENT_DAMAGED"
