"""What the service knows about a run: kept in the run's folder, so that the next service knows it too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.files import write_json
from trainer.service.run_spec import ExecutorKind, RunSpec

MAX_EARLIER = 100  # attempts; a Job that is over is gone after a day by default
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
class EarlierAttempt:
    """What is still known of an attempt when the next one is made: enough to find what it has left in a cluster."""

    attempt: int
    token: str
    executor: ExecutorKind | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        spec: of the newest attempt; its executor is said.
        token: marks what belongs to the newest attempt.
        requests: digests of the requests that started it, by their ids.
        created_s, queued_s, started_s, ended_s: since the epoch; the last three of the newest attempt.
        earlier: attempts before the newest, the last MAX_EARLIER of them.
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
    earlier: tuple[EarlierAttempt, ...] = ()

    def as_earlier(self) -> EarlierAttempt:
        """The newest attempt, for the record of the one after it."""
        return EarlierAttempt(attempt=self.attempt, token=self.token, executor=self.spec.executor)

    def attempts(self) -> Iterator[RunRecord]:
        """The record of each attempt that is known, as far as its executor needs it: the newest first."""
        yield self
        for before in reversed(self.earlier):
            spec = replace(self.spec, executor=before.executor)
            yield replace(self, attempt=before.attempt, token=before.token, spec=spec, earlier=())


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
        parts = {
            "spec": RunSpec.from_json(written["spec"]),
            "state": RunState(written["state"]),
            "earlier": tuple(_earlier(each) for each in written.get("earlier", ())),
        }
        return RunRecord(**known_of(RunRecord, written) | parts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error!r}") from None


def known_of(kind: type[Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of a record's fields. What a newer service has written besides is passed over: one can go back."""
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in written.items() if name in names}


def _earlier(written: Mapping[str, Any]) -> EarlierAttempt:
    executor = written["executor"]
    return EarlierAttempt(
        attempt=written["attempt"], token=written["token"], executor=ExecutorKind(executor) if executor else None
    )


def check_is_of(folder: Path, name: str) -> None:
    """Raises ValueError where what is kept in a run's folder is not of that run: a copied folder would speak for it."""
    if name != folder.name:
        raise ValueError(f"it is of run {name!r}")


def digest_of(content: Mapping[str, Any]) -> str:
    """What is the same for two requests that ask for the same."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
