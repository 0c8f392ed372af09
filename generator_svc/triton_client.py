"""Asking one Triton: the only file that knows tritonclient, and what Triton's errors mean.

What was measured on Triton 2.51 and is kept by tests:

* A sequence gets its id from Triton: ids that several generators choose would meet, and the second of two equal ones
  ends the first. The START and END flags are the scheduler's too; a request that bears END is never run again.
* With the header `triton_grpc_error` a stream ends with the status that the model gave. What is refused before it
  reaches a model still comes as a text without one.
* A request whose stub has been killed is INTERNAL after about a second, and so is every later one, while all of
  Triton's own health calls go on saying "ready".
* Leaving a stream cancels its request before its next step.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

from common.service.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from generator_svc.stage_tensors import NUMPY_TYPES, Tensors, unpack_error

MAX_MESSAGE_BYTES = 1 << 30  # 64 pictures of 1024 x 1024 are 805 MB; Triton's own limit is 2 GiB
RETRY_AFTER_S = 1.0

Kind = Literal[
    "queue_full", "queue_timeout", "stopping", "not_loaded", "stub_dead", "unreachable", "hung", "raised", "other"
]
"""What went wrong at Triton, as metrics label it."""

_DATA_TYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}
_STATUS_HEADER = {"triton_grpc_error": "true"}
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # one connection for each model: none waits behind another's pictures
    # A Triton that comes back is found at once: its canary decides when to try, not the channel.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # whoever chooses endpoints retries, and nobody below
)


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
            return EndpointFailed(f"{where}: {_first_line(said)}", kind=known.kind, is_down=known.is_down)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{where} did not answer within the time that is left")
    if code in (None, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return RequestRefused(f"{where}: {said}")
    return EndpointFailed(f"{where}: {code.name}: {_first_line(said)}", kind="other", is_down=False)


def kind_of(error: Exception) -> Kind | None:
    """The label of an error of Triton's; None for what is no failure of it."""
    return error.kind if isinstance(error, EndpointFailed | QueueRefused) else None


class TritonClient:
    """One connection to one Triton, made in the event loop that uses it; it connects at the first call."""

    def __init__(self, address: str) -> None:
        """`address`: host:port or unix:/path."""
        self.address = address
        self._client = triton.InferenceServerClient(address, channel_args=list(_OPTIONS))

    async def stream(self, model: str, tensors: Tensors, *, timeout_s: float | None) -> AsyncGenerator[Tensors]:
        """Ask a model that answers many times; leaving the iterator (`aclosing`) cancels the request.

        Args:
            model: its name; the version is the one that is served.
            tensors: inputs by name.
            timeout_s: what the whole answer may take; Triton is told, too. None: there is no limit.

        Raises:
            ServiceError, RequestRefused: see `explain`.
        """
        where = f"{model} at {self.address}"
        request: dict[str, Any] = {"model_name": model, "inputs": _inputs(tensors), "timeout": _microseconds(timeout_s)}

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield request

        responses: Any = self._client.stream_infer(requests(), stream_timeout=timeout_s, headers=_STATUS_HEADER)
        try:
            async for result, error in responses:
                if error is not None:
                    raise explain(None, error.message() or "", where=where)
                yield _outputs(result)
        except grpc.aio.AioRpcError as error:
            raise explain(error.code(), error.details() or "", where=where) from error
        finally:
            responses.cancel()

    async def infer(self, model: str, tensors: Tensors, *, timeout_s: float | None) -> Tensors:
        """Ask a model that answers once; the rest as in `stream`."""
        try:
            result = await self._client.infer(
                model, _inputs(tensors), timeout=_microseconds(timeout_s), client_timeout=timeout_s
            )
        except InferenceServerException as error:
            name = str(error.status() or "").removeprefix("StatusCode.")
            code = getattr(grpc.StatusCode, name, None)
            raise explain(code, error.message() or "", where=f"{model} at {self.address}") from error
        return _outputs(result)

    async def is_live(self, timeout_s: float) -> bool:
        """Whether Triton itself answers within so many seconds; its models may not."""
        try:
            return bool(await self._client.is_server_live(client_timeout=timeout_s))
        except InferenceServerException:
            return False

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        await self._client.close()


def _inputs(tensors: Mapping[str, np.ndarray]) -> list[triton.InferInput]:
    inputs: list[triton.InferInput] = []
    for name, array in tensors.items():
        each = triton.InferInput(name, list(array.shape), _DATA_TYPES[array.dtype])
        each.set_data_from_numpy(array)
        inputs.append(each)
    return inputs


def _outputs(result: Any) -> Tensors:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def _microseconds(timeout_s: float | None) -> int | None:
    return None if timeout_s is None else max(1, int(timeout_s * 1e6))


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else "no reason given"
