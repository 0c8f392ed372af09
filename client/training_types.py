"""What the client of the trainer takes and gives: plain data. Times are RFC 3339, empty where they are not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OVER = ("succeeded", "failed", "cancelled")
"""States of a run in which nothing more happens by itself."""


@dataclass(frozen=True, kw_only=True)
class PodResources:
    """What each pod of a cluster gets; 0: the service's default."""

    ranks: int = 0
    gpus: int = 0
    cpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is trained, and how; see RunSpec in trainer.proto.

    Attributes:
        limit_s, evaluate_every_s, log_every_s, save_every_s: in seconds; None: no limit, and the trainer's defaults.
        executor: `local`, `kubernetes_job` or `kubernetes_train_job`; empty leaves it to the service.
        parallel: of several ranks `ddp` or `fsdp2`; empty leaves it to the service.
    """

    preset: str
    data: str
    examples: int = 0
    limit_s: float | None = None
    evaluate_every_s: float | None = None
    ranks: int = 0
    threads: int = 0
    side: int = 0
    start_from: str = ""
    executor: str = ""
    pod: PodResources | None = None
    log_every_s: float | None = None
    save_every_s: float | None = None
    evaluate_every_steps: int = 0
    save_every_steps: int = 0
    parallel: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; `loss` None: it has not said."""

    step: int
    examples: int
    total_examples: int
    examples_per_second: float
    loss: float | None
    time: str


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export; `state` is `queued`, `running`, `succeeded` or `failed`. See Export in trainer.proto."""

    weights: str
    state: str
    done: int
    total: int
    status: str
    error: str
    started_at: str
    ended_at: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run; `state` is `queued`, `running`, or one of OVER. See Run in trainer.proto."""

    name: str
    spec: RunSpec
    state: str
    cancelling: bool
    status: str
    error: str
    queue_position: int
    attempt: int
    created_at: str
    started_at: str
    ended_at: str
    progress: Progress | None
    export: Export | None
    place: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in OVER


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A line of a run's log: `train`, `held_out` or another kind, and values by name."""

    kind: str
    step: int
    examples: int
    time: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """What a run's averaged weights draw, beside what they should; `png` is a file's bytes."""

    step: int
    examples: int
    time: str
    png: bytes


RunEvent = Run | Figures | SampleGrid
