"""Requests that a tiny cascade draws at once, and what comes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from client.generator import (
    Done,
    Event,
    GenerationRequest,
    GeneratorClient,
    Image,
    NeighborsFound,
    StageOverrides,
)
from common.images import decode_rgb

TIMEOUT_S = 60.0
SIZES = (64, 256, 1024)
PROMPT = "a guide dog, noto style, on a blue background"
REQUEST = GenerationRequest(
    prompt=PROMPT, seed=7, every_stage=True, stages=tuple(StageOverrides(stage=size, steps=2) for size in SIZES)
)
QUICK = replace(REQUEST, stop_at=64, stages=REQUEST.stages[:1])


def draw(client: GeneratorClient, request: GenerationRequest) -> list[Event]:
    """All events of a request."""
    return list(client.generate(request, timeout_s=TIMEOUT_S))


def images(events: list[Event]) -> list[bytes]:
    """The finished pictures among events."""
    return [event.image for event in events if isinstance(event, Image)]


def record(events: list[Event]) -> Any:
    """The record at the end of events."""
    last = events[-1]
    assert isinstance(last, Done)
    return last.record


def found(events: list[Event]) -> NeighborsFound:
    """What was told of neighbors."""
    return next(event for event in events if isinstance(event, NeighborsFound))


def pixels(events: list[Event], picture: int = 0) -> np.ndarray:
    """A finished picture, as integers of any sign."""
    return decode_rgb(images(events)[picture]).astype(int)
