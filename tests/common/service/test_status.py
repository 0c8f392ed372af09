"""Errors become statuses with details, and a client reads them back."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from client.errors import DETAILS_KEY, Violation, retry_after_s, violations
from common.service import errors
from common.service.status import code_of, status_of


class Failed(grpc.RpcError):
    """A failed call, as a client sees it."""

    def __init__(self, trailing: Any) -> None:
        self._trailing = trailing

    def trailing_metadata(self) -> Any:
        """What came behind the answer."""
        return self._trailing


def _seen_by_client(error: Exception) -> Failed:
    return Failed(status_of(error).trailing_metadata)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument("k", "0 is too few"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NotFound("no such thing"), grpc.StatusCode.NOT_FOUND),
        (errors.FailedPrecondition("not now"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.ResourceExhausted("too much"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Unavailable("away"), grpc.StatusCode.UNAVAILABLE),
        (errors.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.AlreadyExists("there"), grpc.StatusCode.ALREADY_EXISTS),
        (errors.Unauthenticated("who"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.PermissionDenied("no"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.Unimplemented("what"), grpc.StatusCode.UNIMPLEMENTED),
        (errors.DataLoss("gone"), grpc.StatusCode.DATA_LOSS),
        (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
def test_codes(error: Exception, code: grpc.StatusCode) -> None:
    assert code_of(error) == status_of(error).code == code
    assert "secret" not in status_of(error).details


def test_every_error_has_a_code() -> None:
    for kind in errors.ServiceError.__subclasses__():
        error = errors.InvalidArgument("f", "d") if kind is errors.InvalidArgument else kind("d")
        assert code_of(error) != grpc.StatusCode.INTERNAL, kind


def test_violations_are_read_back() -> None:
    error = errors.InvalidArgument("k", "0 is too few")
    assert violations(_seen_by_client(error)) == (Violation(field="k", description="0 is too few"),)
    assert status_of(error).details == "k: 0 is too few"
    assert violations(_seen_by_client(errors.NotFound("x"))) == ()


def test_retry_delay_is_read_back() -> None:
    assert retry_after_s(_seen_by_client(errors.ResourceExhausted("full", retry_after_s=1.25))) == 1.25
    assert retry_after_s(_seen_by_client(errors.Unavailable("away", retry_after_s=2))) == 2
    assert retry_after_s(_seen_by_client(errors.Unavailable("away"))) is None


def test_errors_without_readable_details() -> None:
    for failed in (grpc.RpcError(), Failed(None), Failed(()), Failed(((DETAILS_KEY, b"\xff\xff"),))):
        assert violations(failed) == ()
        assert retry_after_s(failed) is None


def test_long_texts_fit_into_trailers() -> None:
    """gRPC takes 8 KiB of trailers, and percent-encodes the message."""
    for text in ("x" * 100_000, "🐕" * 100_000):
        error = errors.InvalidArgument(text, text)
        status = status_of(error)
        ((_, details),) = status.trailing_metadata
        assert 3 * len(status.details.encode()) + 4 / 3 * len(details) < 8000
        assert status.details.endswith("...")
    assert status_of(errors.NotFound("é" * 300)).details == "é" * 300
