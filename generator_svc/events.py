"""What the pipeline says while it draws; the fields are those of generator.proto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from generator_svc.neighbors import Retrieved


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The order is understood, and there is room for it."""

    prompt: str
    seed: int
    num_pictures: int
    stages: tuple[int, ...]


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
    """A picture has left a stage; `png` is empty in the last one."""

    stage: int
    picture: int
    png: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A finished picture with its record inside."""

    picture: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Done:
    """Everything is drawn."""

    record: Mapping[str, Any]


Event = Accepted | NeighborsFound | StageStarted | StepDone | StageFinished | Image | Done
