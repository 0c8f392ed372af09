"""What Triton's errors mean to whoever asked it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import grpc

from common.service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from generator_svc.channel_tls import fault_of
from generator_svc.stage_tensors import unpack_error

RETRY_AFTER_S = 1.0

Kind = Literal[
    "queue_full", "queue_timeout", "stopping", "not_loaded", "stub_dead", "unreachable", "hung", "raised", "other"
]
"""What went wrong at Triton, as metrics label it."""


class EndpointFailed(Unavailable):
    """This endpoint has not done it; another may.

    Attributes:
        kind: what went wrong.
        is_down: it will not do anything else either until it is restarted.
    """

    default_reason = "TRITON_UNAVAILABLE"

    def __init__(self, description: str, *, kind: Kind, is_down: bool) -> None:
        super().__init__(description, retry_after_s=RETRY_AFTER_S)
        self.kind: Kind = kind
        self.is_down = is_down


class QueueRefused(ResourceExhausted):
    """Triton's queue has no place, or had none in time: trying elsewhere at once would only add to the load."""

    default_reason = "TRITON_QUEUE"

    def __init__(self, description: str, *, kind: Kind) -> None:
        super().__init__(description, retry_after_s=RETRY_AFTER_S)
        self.kind: Kind = kind


class RequestRefused(RuntimeError):
    """Triton does not take a request of this form: a mistake of ours, not of the caller."""


@dataclass(frozen=True, kw_only=True)
class _Text:
    """An error that is known by its text alone, since Triton gives its code to other things too."""

    pattern: str
    kind: Kind
    is_queue: bool = False
    is_down: bool = True


_TEXTS = (
    _Text(pattern=r"Exceeds maximum queue size", kind="queue_full", is_queue=True),
    _Text(pattern=r"Request timeout expired", kind="queue_timeout", is_queue=True),
    _Text(pattern=r"Server is stopping|Server exiting", kind="stopping"),
    _Text(pattern=r"Request for unknown model|is not ready|has no available versions", kind="not_loaded"),
    _Text(pattern=r"Stub process .* is not healthy|stub process has exited", kind="stub_dead"),
    _Text(pattern=r"Failed to process the request|ServiceError\[", kind="raised", is_down=False),
    _Text(
        pattern=r"failed to connect|Connection (refused|reset)|Socket closed|GOAWAY|DNS resolution failed|No route to host",
        kind="unreachable",
    ),
)
_REFUSED = re.compile(r"inference input|input '")  # what comes before the model says of a request's tensors
_PREFIX = re.compile(r"^\[request id: [^\]]*\] ")


def explain(code: grpc.StatusCode | None, text: str, *, where: str) -> Exception:
    """What an error of Triton means to whoever asked it.

    Args:
        code: the status; None for an error that came as a text in a stream.
        text: its message.
        where: the model and the address, for messages of ours.

    Returns:
        EndpointFailed: another endpoint may do it. QueueRefused, DeadlineExceeded: none should be tried. RequestRefused:
        we asked for what cannot be. Or what the model itself raised (`stage_tensors.pack_error`); a model that is
        Unavailable is an endpoint that failed.
    """
    said = _PREFIX.sub("", text)
    own = unpack_error(text)
    if isinstance(own, Unavailable):
        return EndpointFailed(f"{where}: {own.description}", kind="other", is_down=False)
    if own is not None:
        return own
    for known in _TEXTS:
        if re.search(known.pattern, said):
            if known.is_queue:
                return QueueRefused(f"{where}: {said}", kind=known.kind)
            why = f"{fault} ({first_line(said)})" if (fault := fault_of(said)) else first_line(said)
            return EndpointFailed(f"{where}: {why}", kind=known.kind, is_down=known.is_down)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late(where)
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED) or _REFUSED.search(said):
        return RequestRefused(f"{where}: {said}")
    named = f"{code.name}: " if code else ""
    return EndpointFailed(f"{where}: {named}{first_line(said)}", kind="other", is_down=False)


def kind_of(error: Exception) -> Kind | None:
    """The label of an error of Triton's; None for what is no failure of it."""
    return error.kind if isinstance(error, EndpointFailed | QueueRefused) else None


def late(where: str) -> DeadlineExceeded:
    """What a deadline that has passed is."""
    return DeadlineExceeded(f"{where} did not answer within the time that is left")


def first_line(text: str) -> str:
    """Of a message; never empty."""
    return text.splitlines()[0] if text else "no reason given"
