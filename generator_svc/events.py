"""What the pipeline says while it draws; the fields are those of generator.proto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from generator_svc.neighbors import Retrieved
from generator_svc.picture_files import ImageFormat


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The order is understood, and will be drawn; `queue_position` go before it."""

    prompt: str
    seeds: tuple[int, ...]
    stages: tuple[int, ...]
    queue_position: int = 0


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The order still waits."""

    queue_position: int


@dataclass(frozen=True, kw_only=True)
class NeighborsFound:
    """Retrieval has answered, or was not asked."""

    retrieved: Retrieved


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    stage: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A picture has come one step further; `preview_png` is empty where none was asked for."""

    stage: int
    picture: int
    step: int
    steps: int
    preview_png: bytes = b""


@dataclass(frozen=True, kw_only=True)
class StageFinished:
    """A picture has left a stage; `image` is empty in the last one, and where it was not asked for."""

    stage: int
    picture: int
    image: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A finished picture with its record inside."""

    picture: int
    image: bytes
    image_format: ImageFormat
    seed: int
    record_json: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """Everything is drawn."""

    record: Mapping[str, Any]


Event = Accepted | Queued | NeighborsFound | StageStarted | StepDone | StageFinished | Image | Done
