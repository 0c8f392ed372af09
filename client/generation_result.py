"""Events become a result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.generation_messages import GenerationFailed
from client.generation_types import Done, Event, Generation, GenerationRequest, Image, NeighborsFound, StageFinished


class Collected:
    """What the events of one request have brought so far."""

    def __init__(self) -> None:
        self._neighbors: NeighborsFound | None = None
        self._stages: list[StageFinished] = []
        self._images: list[Image] = []
        self._done: Done | None = None

    def add(self, event: Event) -> None:
        """Keep what belongs to the result."""
        match event:
            case NeighborsFound():
                self._neighbors = event
            case StageFinished() if event.image:
                self._stages.append(event)
            case Image():
                self._images.append(event)
            case Done():
                self._done = event

    def generation(self) -> Generation:
        """The result.

        Raises:
            GenerationFailed: the stream ended before everything was drawn.
        """
        if self._done is None or self._neighbors is None:
            raise GenerationFailed("INTERNAL", "the service ended the stream before everything was drawn")
        return Generation(
            images=tuple(self._images),
            stages=tuple(self._stages),
            neighbors=self._neighbors,
            record=self._done.record,
        )


def asked(what: str | GenerationRequest, knobs: dict[str, Any]) -> GenerationRequest:
    """A prompt or a request, with knobs by the names of `GenerationRequest`.

    Raises:
        TypeError: there is no knob of that name.
    """
    return GenerationRequest(prompt=what, **knobs) if isinstance(what, str) else replace(what, **knobs)
