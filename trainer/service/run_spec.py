"""What is trained, and how: plain data, as requests bring it and records keep it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any


class ExecutorKind(StrEnum):
    """Where a run runs; see trainer.proto."""

    LOCAL = "local"
    KUBERNETES_JOB = "kubernetes_job"
    KUBERNETES_TRAIN_JOB = "kubernetes_train_job"


@dataclass(frozen=True, kw_only=True)
class PodResources:
    """What each pod gets; 0: the service's default."""

    ranks: int = 0
    gpus: int = 0
    cpus: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run is asked to be; see RunSpec in trainer.proto.

    Attributes:
        data, start_from: folders under the service's data and weights folders.
        limit_s, evaluate_every_s, log_every_s, save_every_s: in seconds; 0: no limit, and the trainer's defaults.
        parallel: of several ranks `ddp`, `fsdp2`; empty: the trainer's default.
        executor: None: the service's own.
    """

    preset: str = ""
    data: str = ""
    examples: int = 0
    limit_s: float = 0.0
    evaluate_every_s: float = 0.0
    ranks: int = 0
    threads: int = 0
    side: int = 0
    start_from: str = ""
    executor: ExecutorKind | None = None
    pod: PodResources = PodResources()
    log_every_s: float = 0.0
    save_every_s: float = 0.0
    evaluate_every_steps: int = 0
    save_every_steps: int = 0
    parallel: str = ""

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return self.ranks or 1

    @property
    def num_pods(self) -> int:
        """Pods that they are spread over."""
        return self.num_ranks // (self.pod.ranks or 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> RunSpec:
        """What `to_json` gave.

        Raises:
            TypeError, ValueError: it did not.
        """
        executor = document["executor"]
        spec = cls(
            **{
                **document,
                "executor": ExecutorKind(executor) if executor else None,
                "pod": PodResources(**document["pod"]),
            }
        )
        for part in (spec, spec.pod):
            _check_kinds(part)
        return spec


def _check_kinds(part: RunSpec | PodResources) -> None:
    """Raises ValueError where a value is not of its field's kind, or is a number that no request can bring."""
    for each in fields(part):
        value = getattr(part, each.name)
        if isinstance(each.default, int | float):
            kinds = (int,) if isinstance(each.default, int) else (int, float)
            fits = type(value) in kinds and 0 <= value < math.inf
        else:
            fits = not isinstance(each.default, str) or isinstance(value, str)
        if not fits:
            raise ValueError(f"{each.name}: {value!r}")
