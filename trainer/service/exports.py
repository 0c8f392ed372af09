"""Exports of runs: one after the other, each a process that goes on without us, with its progress in what it says."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as with_changes
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.files import write_json
from common.service.errors import FailedPrecondition, InvalidArgument, Unavailable
from trainer.service.bounded_log import MAX_BYTES
from trainer.service.commands import export_command
from trainer.service.local_process import Ending, LocalProcess
from trainer.service.request_ids import MAX_REQUESTS, canonical
from trainer.service.run_record import FOLDER, RunRecord, check_is_of, known_of
from trainer.service.spec_rules import Folders, inside

EXPORT, EXPORT_FOLDER = "export.json", "export"  # in the service's part of a run's folder
STATES = "state-*.safetensors"
_STEP = re.compile(r"\[(\d+)/(\d+)\] (.*)")

log = logging.getLogger(__name__)


class ExportState(StrEnum):
    """See trainer.proto."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens."""
        return self in (ExportState.SUCCEEDED, ExportState.FAILED)


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The newest export of a run; see Export in trainer.proto.

    Attributes:
        preset, data: of the run when it was asked for.
        replace: whether weights that saw more examples are replaced, too.
        token: marks the processes that belong to it.
        request_ids: of the requests that began or joined it.
        earlier: exports of the run that were over before this one began and that requests have named, oldest first.
        queued_s, started_s, ended_s: since the epoch.
    """

    run: str
    weights: str
    token: str
    request_ids: tuple[str, ...]
    state: ExportState
    queued_s: float
    preset: str = ""
    data: str = ""
    replace: bool = False
    earlier: tuple[ExportRecord, ...] = ()
    started_s: float | None = None
    ended_s: float | None = None
    done: int = 0
    total: int = 0
    status: str = ""
    error: str = ""


class Exports:
    """The newest export of each run; may be asked on any thread."""

    def __init__(self, folders: Folders, *, log_bytes: int = MAX_BYTES) -> None:
        """Read what there is. Of what an export says `log_bytes` are kept."""
        self._log_bytes = log_bytes
        self.on_change: Callable[[], object] = lambda: None
        """Told that `reconcile` has something to do."""
        self._folders = folders
        self._lock = threading.Lock()
        self._processes: dict[str, LocalProcess] = {}
        self._records: dict[str, ExportRecord] = {}
        for folder in sorted(folders.runs.iterdir()):
            record = _read(folder)
            if record is not None:
                self._records[record.run] = record

    def start(self, run: RunRecord, weights: str, request_id: str, *, replace: bool = False) -> ExportRecord:
        """Begin an export, or join the one that goes on; a request that is known is given its own as it is.

        Raises:
            InvalidArgument, FailedPrecondition: as ExportRun in trainer.proto says.
            Unavailable: it cannot be written down.
        """
        request_id = canonical(request_id)
        inside("weights", weights, self._folders.weights, "weights")
        inside("spec.data", run.spec.data, self._folders.data, "data")  # others can write into the folders of runs
        with self._lock:
            before = self._records.get(run.name)
            known = _known(before, request_id)
            if known is not None:
                if (known.weights, known.replace) != (weights, replace):
                    raise InvalidArgument(
                        "request_id",
                        f"{request_id} is the id of a request with other content",
                        reason="REQUEST_ID_REUSED",
                    )
                return known
            if before is not None and not before.state.is_over:
                if (before.weights, before.replace) == (weights, replace):
                    return self._join(before, request_id)
                raise FailedPrecondition(
                    f"run: {run.name!r} is being exported to {before.weights!r}", reason="EXPORT_UNDER_WAY"
                )
            if not any(self._folders.run(run.name).glob(STATES)):
                raise FailedPrecondition(f"run: {run.name!r} has saved no state yet", reason="NOTHING_TO_EXPORT")
            record = ExportRecord(
                run=run.name,
                weights=weights,
                preset=run.spec.preset,
                data=run.spec.data,
                replace=replace,
                token=uuid.uuid4().hex,
                request_ids=(request_id,) if request_id else (),
                state=ExportState.QUEUED,
                queued_s=time.time(),
                earlier=_with_earlier(before),
            )
            self._write_asked(record)
        self.on_change()
        return record

    def _join(self, record: ExportRecord, request_id: str) -> ExportRecord:
        if not request_id:
            return record
        joined = with_changes(record, request_ids=(*record.request_ids, request_id)[-MAX_REQUESTS:])
        self._write_asked(joined)
        return joined

    def get(self, run: str) -> ExportRecord | None:
        """The newest export of a run."""
        return self._records.get(run)

    def find(self, run: str, token: str) -> ExportRecord | None:
        """An export of a run, though another may have begun since; None: it is not known any more."""
        newest = self._records.get(run)
        found = (newest, *newest.earlier) if newest is not None else ()
        return next((record for record in found if record.token == token), None)

    @contextmanager
    def letting_go(self, run: str) -> Iterator[None]:
        """Forget a run's exports when the block, which removes its folder, ends well; none begins in the meantime.

        Raises:
            FailedPrecondition: one is under way.
        """
        with self._lock:
            newest = self._records.get(run)
            if newest is not None and not newest.state.is_over:
                raise FailedPrecondition(
                    f"run: {run!r} is being exported to {newest.weights!r}", reason="EXPORT_UNDER_WAY"
                )
            yield
            self._records.pop(run, None)

    def reconcile(self) -> None:
        """Follow the export that goes on, and begin the next one."""
        under_way = [record for record in self._records.copy().values() if record.state == ExportState.RUNNING]
        for record in under_way:
            self._follow(record)
        if any(record.state == ExportState.RUNNING for record in self._records.copy().values()):
            return
        waiting = [record for record in self._records.copy().values() if record.state == ExportState.QUEUED]
        if waiting:
            first = min(waiting, key=lambda record: record.queued_s)
            self._change(first, state=ExportState.RUNNING, started_s=time.time())
            self._follow(first)

    def _follow(self, record: ExportRecord) -> None:
        process = self._process(record)
        seen = process.look()
        if seen == "absent":
            try:
                process.launch(
                    export_command(
                        record.run, record.preset, record.data, record.weights, self._folders, replace=record.replace
                    )
                )
            except OSError as error:
                reason = f"cannot be started: {error.strerror}"
                self._change(record, state=ExportState.FAILED, ended_s=time.time(), error=reason)
            return
        said = process.tail()
        steps = _STEP.findall(said)
        if steps:
            done, total, status = steps[-1]
            self._change(record, done=int(done), total=int(total), status=status)
        if not isinstance(seen, Ending):
            return
        last = said.splitlines()[-1] if said else ""
        if seen.code == 0:
            written = _relative(last, self._folders.weights)
            state, changes = ExportState.SUCCEEDED, {"status": written}
        else:
            state, changes = ExportState.FAILED, {"status": "", "error": f"{seen}\n{said}" if said else str(seen)}
        self._change(record, state=state, ended_s=seen.time_s, **changes)
        log.info("export ended", extra={"run": record.run, "state": state.value})

    def _process(self, record: ExportRecord) -> LocalProcess:
        if record.token not in self._processes:
            folder = self._folders.run(record.run) / FOLDER / EXPORT_FOLDER
            self._processes = {
                record.token: LocalProcess(folder, record.token, log_bytes=self._log_bytes)
            }  # one at a time
        return self._processes[record.token]

    def _change(self, record: ExportRecord, **changes: Any) -> None:
        with self._lock:
            current = self._records.get(record.run)
            if current is None or current.token != record.token:
                return
            changed = with_changes(current, **changes)
            if changed != current:
                self._write(changed)

    def _write_asked(self, record: ExportRecord) -> None:
        try:
            self._write(record)
        except OSError as error:
            raise Unavailable(f"the export cannot be written down: {error.strerror}", reason="NOT_WRITTEN") from None

    def _write(self, record: ExportRecord) -> None:
        write_json(self._folders.run(record.run) / FOLDER / EXPORT, asdict(record))
        self._records[record.run] = record


def _relative(path: str, root: Path) -> str:
    """What was written, as those name it who know the weights folder alone."""
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path


def _known(newest: ExportRecord | None, request_id: str) -> ExportRecord | None:
    """The export that a request has begun or joined; None: there is none."""
    if newest is None or not request_id:
        return None
    return next((record for record in (newest, *newest.earlier) if request_id in record.request_ids), None)


def _with_earlier(record: ExportRecord | None) -> tuple[ExportRecord, ...]:
    """What the export after this one keeps: those before it, and itself where a request has named it."""
    if record is None:
        return ()
    return (*record.earlier, *((with_changes(record, earlier=()),) if record.request_ids else ()))[-MAX_REQUESTS:]


def _read(folder: Path) -> ExportRecord | None:
    try:
        written: Mapping[str, Any] = json.loads((folder / FOLDER / EXPORT).read_text())
        check_is_of(folder, written["run"])
        record = _record(written)
        inside("weights", record.weights, folder, "weights")  # no record leads a process out of the service's folders
        if record.data:
            inside("data", record.data, folder, "data")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidArgument) as error:
        log.error("export passed over: its record is damaged", extra={"run": folder.name, "error": repr(error)})
        return None


def _record(written: Mapping[str, Any]) -> ExportRecord:
    parts = {
        "request_ids": tuple(written["request_ids"]),
        "state": ExportState(written["state"]),
        "earlier": tuple(map(_record, written["earlier"])),
    }
    return ExportRecord(**known_of(ExportRecord, written) | parts)
