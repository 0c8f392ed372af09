"""A typed client of the generator service."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Self

import grpc
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc

from client.generation_messages import GenerationFailed, event_of, request_message
from client.generation_types import (
    Accepted,
    Done,
    Event,
    GenerationRequest,
    Image,
    Neighbor,
    NeighborsFound,
    Queued,
    Reference,
    StageFinished,
    StageOverrides,
    StageStarted,
    StartFrom,
    StepDone,
)

__all__ = [
    "Accepted",
    "Done",
    "Event",
    "GenerationFailed",
    "GenerationRequest",
    "GeneratorClient",
    "Image",
    "Neighbor",
    "NeighborsFound",
    "Queued",
    "Reference",
    "StageFinished",
    "StageOverrides",
    "StageStarted",
    "StartFrom",
    "StepDone",
]

MAX_EVENT_BYTES = 256 << 20  # the neighbors' files come in one event


class GeneratorClient:
    """One channel to a generator; safe to use from several threads."""

    def __init__(self, address: str) -> None:
        """`address` is unix:/path or host:port; the channel connects at the first call."""
        self._channel = grpc.insecure_channel(address, options=(("grpc.max_receive_message_length", MAX_EVENT_BYTES),))
        self._stub = pb_grpc.GeneratorServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def generate(self, request: GenerationRequest, *, timeout_s: float) -> Generator[Event, None, None]:
        """Draw, and yield what the service says. Closing the generator cancels the call.

        Args:
            request: what is to be drawn.
            timeout_s: deadline of the whole call.

        Raises:
            ValueError: a name (sampler, strategy, thresholding, method) is none of the contract's, or a number
                does not fit its field.
            GenerationFailed: the service refused or failed.
        """
        stream = self._stub.Generate(request_message(request), timeout=timeout_s)
        try:
            for response in stream:
                yield event_of(response)
        except grpc.RpcError as error:
            raise GenerationFailed.of(error) from error
        finally:
            stream.cancel()
