"""A typed client of the generator service."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Self

from client.channel import Tls
from client.connection import Connection
from client.generation_messages import GenerationFailed, events_call, images_call, models_call
from client.generation_types import (
    Accepted,
    Done,
    Event,
    Generation,
    GenerationRequest,
    Image,
    Models,
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
from client.health import ServiceHealth
from client.retry import NO_RETRY, RetryPolicy

__all__ = [
    "Accepted",
    "Done",
    "Event",
    "Generation",
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

SERVICES = ("reimagen.generator.v1.GeneratorService",)
MODELS_TIMEOUT_S = 30.0


class GeneratorClient:
    """One channel to a generator; safe to use from several threads. Everything here raises GenerationFailed."""

    def __init__(
        self, address: str, *, api_key: str = "", tls: Tls | None = None, retry: RetryPolicy = NO_RETRY
    ) -> None:
        """Connects at the first call; see `client.channel.open_channel` for addresses."""
        self._connection = Connection(address, api_key=api_key, tls=tls, retry=retry, failure=GenerationFailed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._connection.close()

    def generate(self, request: GenerationRequest, *, timeout_s: float) -> Generator[Event, None, None]:
        """Draw, and yield what the service says. Closing the generator cancels the call.

        Args:
            request: what is to be drawn.
            timeout_s: deadline of the whole call.

        Raises:
            FieldError: a name (sampler, strategy, thresholding, method) is none of the contract's, or a number
                does not fit its field; a ValueError.
        """
        yield from self._connection.stream(events_call(request), timeout_s=timeout_s)

    def generate_images(self, request: GenerationRequest, *, timeout_s: float) -> Generation:
        """Draw, in one answer; see `generate`."""
        return self._connection.ask(images_call(request), timeout_s=timeout_s)

    def models(self) -> Models:
        """What the service draws with."""
        return self._connection.ask(models_call(), timeout_s=MODELS_TIMEOUT_S)

    def health(self) -> tuple[ServiceHealth, ...]:
        """Whether the service answers; never fails."""
        return self._connection.health(SERVICES)
