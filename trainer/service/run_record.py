"""What the service knows about a run: kept in the run's folder, so that the next service knows it too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.files import write_json
from trainer.service.run_spec import RunSpec

FOLDER, RECORD = "service", "run.json"  # in the run's folder


class RunState(StrEnum):
    """See trainer.proto."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        spec: of the newest attempt; its executor is said.
        token: marks what belongs to the newest attempt.
        requests: digests of the requests that started it, by their ids.
        created_s, queued_s, started_s, ended_s: since the epoch; the last three of the newest attempt.
        launched: whether the newest attempt was given to its executor.
        cancel_asked_s: when it was asked to end; None: it was not.
        status, error, place: see Run in trainer.proto.
        exit_code: of a FAILED run, as `Observed` has it.
    """

    name: str
    spec: RunSpec
    state: RunState
    attempt: int
    token: str
    created_s: float
    queued_s: float
    requests: Mapping[str, str] = field(default_factory=dict)
    launched: bool = False
    started_s: float | None = None
    ended_s: float | None = None
    cancel_asked_s: float | None = None
    status: str = ""
    error: str = ""
    place: str = ""
    exit_code: int | None = None


def write_record(record: RunRecord, folder: Path) -> None:
    """Keep it in the run's folder.

    Raises:
        OSError: it cannot be written; what was kept before is as it was.
    """
    write_json(folder / FOLDER / RECORD, asdict(record))


def read_record(folder: Path) -> RunRecord | None:
    """What is kept in a run's folder; None: the service knows nothing about it.

    Raises:
        ValueError: it is damaged, or that of another folder, of which this one is a copy.
    """
    path = folder / FOLDER / RECORD
    try:
        written: dict[str, Any] = json.loads(path.read_text())
        check_is_of(folder, written["name"])
        spec, state = RunSpec.from_json(written["spec"]), RunState(written["state"])
        return RunRecord(**{**written, "spec": spec, "state": state})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!r}") from None


def check_is_of(folder: Path, name: str) -> None:
    """Raises ValueError where what is kept in a run's folder is not of that run: a copied folder would speak for it."""
    if name != folder.name:
        raise ValueError(f"it is of run {name!r}")


def digest_of(content: Mapping[str, Any]) -> str:
    """What is the same for two requests that ask for the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
