"""What goes wrong in a service, said without gRPC: the domain raises these, `status.py` maps them."""

from __future__ import annotations


class ServiceError(Exception):
    """An error whose message may be shown to the caller. Any other exception is ours alone."""

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.description = description


class InvalidArgument(ServiceError):
    """The request is wrong whatever the state of the service: `field` names the part, `description` why."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.violations: tuple[tuple[str, str], ...] = ((field, description),)


class NotFound(ServiceError):
    """Something that the request names does not exist here."""


class FailedPrecondition(ServiceError):
    """The request is well formed, but the service lacks what it needs: retrying does not help."""


class ResourceExhausted(ServiceError):
    """A limit is reached (queue, quota); `retry_after_s` seconds later it may be worth another try."""

    def __init__(self, description: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(description)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """The service, or one that it calls, cannot answer now; the caller may try again."""

    def __init__(self, description: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(description)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(ServiceError):
    """The caller's deadline has passed, or leaves too little time for the work."""


class DataLoss(ServiceError):
    """Stored content is damaged; the description names it."""
