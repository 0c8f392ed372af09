"""The runs of a service: started, queued, followed, cancelled. What is asked is written down first, and then done.

Callers change records; `reconcile`, on a thread for each executor, makes what is there as the records say. So the service may
end at any time: the next one reads the records and goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.service.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from trainer.service.executor import Executor, ExecutorAway, ExecutorError, Observed, Phase
from trainer.service.request_ids import MAX_REQUESTS, canonical, eight_digits
from trainer.service.run_log import Progress, ProgressReader
from trainer.service.run_record import MAX_EARLIER, RunRecord, RunState, digest_of, read_record, write_record
from trainer.service.run_removal import SUFFIX, discard, discard_all, set_aside
from trainer.service.run_spec import ExecutorKind, RunSpec
from trainer.service.spec_rules import Folders, check_folder, check_name, check_spec, total_examples

_KEPT = ("preset", "data", "start_from")  # of a run that goes on
_SOMEBODY_ELSE = "was asked to end, by nobody of this service; StartRun goes on from the state that it saved"

log = logging.getLogger(__name__)


class Runs:
    """All runs of one folder; may be asked on any thread."""

    def __init__(
        self,
        folders: Folders,
        executors: Mapping[ExecutorKind, Executor],
        *,
        default: ExecutorKind,
        cancel_grace_s: float,
    ) -> None:
        """Read what there is.

        Args:
            default: the executor of runs that name none.
            cancel_grace_s: seconds that a cancelled run gets to save its state.
        """
        self.on_change: Callable[[ExecutorKind], object] = lambda kind: None
        """Told that `reconcile` has something to do."""
        self._folders = folders
        self._executors = executors
        self._default = default
        self._cancel_grace_s = cancel_grace_s
        self._lock = threading.Lock()
        self._progress = ProgressReader()
        self._records: dict[str, RunRecord] = {}
        self._damaged: dict[str, str] = {}
        self._requests: dict[str, tuple[str, str]] = {}  # name and digest
        self._stopped: set[str] = set()  # tokens of attempts that were asked to end
        discard_all(folders.runs)
        for folder in sorted(folders.runs.iterdir()):
            if not folder.name.endswith(SUFFIX):
                self._load(folder.name)

    def start(self, name: str, spec: RunSpec, request_id: str) -> RunRecord:
        """See StartRun in trainer.proto.

        Raises:
            InvalidArgument, AlreadyExists, FailedPrecondition: as the contract says.
            Unavailable: it cannot be written down.
        """
        request_id, digest = canonical(request_id), digest_of({"run": name, "spec": spec.to_json()})
        known = self._known(request_id, digest)
        if known is not None:
            return known
        name = name or f"{spec.preset}-{eight_digits(request_id)}"
        spec = replace(spec, executor=spec.executor or self._default)
        check_spec(spec, self._folders)
        check_name(name)
        if spec.executor not in self._executors:
            raise FailedPrecondition(f"this service runs nothing as {spec.executor}", reason="EXECUTOR_NOT_CONFIGURED")
        with self._lock:
            known = self._known(request_id, digest)
            if known is not None:  # the same request, a moment ago
                return known
            record = self._next(name, spec)
            if request_id:
                requests = [*record.requests.items(), (request_id, digest)][-MAX_REQUESTS:]
                record = replace(record, requests=dict(requests))
            self._write(record)
            self._remember(record)
        log.info("run started", extra={"run": name, "preset": spec.preset, "attempt": record.attempt})
        self.on_change(record.spec.executor or self._default)
        return record

    def get(self, name: str) -> RunRecord:
        """A run.

        Raises:
            NotFound: there is none. DataLoss: its record is damaged.
        """
        if name in self._damaged:
            raise DataLoss(f"run: the record of {name!r} is damaged")
        if name not in self._records:
            raise NotFound(f"run: there is no run {name!r}", reason="RUN_NOT_FOUND")
        return self._records[name]

    def list(self, *, after: str, limit: int, states: Collection[RunState]) -> tuple[list[RunRecord], str]:
        """Runs by name past `after`, and the token of the next page."""
        found = [
            record
            for name, record in sorted(self._records.copy().items())
            if name > after and (not states or record.state in states)
        ]
        return found[:limit], found[limit - 1].name if len(found) > limit else ""

    def cancel(self, name: str) -> RunRecord:
        """See CancelRun in trainer.proto.

        Raises:
            NotFound, FailedPrecondition: as the contract says. Unavailable: it cannot be written down.
        """
        self.get(name)
        with self._lock:
            record = self._records[name]
            if record.state == RunState.CANCELLED or record.cancel_asked_s is not None:
                return record
            if record.state.is_over:
                raise FailedPrecondition(f"run: {name!r} has {record.state}", reason="RUN_IS_OVER")
            if record.launched:
                record = replace(record, cancel_asked_s=time.time())
            else:
                record = replace(record, state=RunState.CANCELLED, ended_s=time.time(), status="")
            self._write(record)
            self._remember(record)
        log.info("run cancelled", extra={"run": name})
        kind = record.spec.executor or self._default
        if kind in self._executors:  # else a service that has the executor again does what is left to do
            self.on_change(kind)
        return record

    def delete(self, name: str, *, letting_go: Callable[[str], AbstractContextManager[object]]) -> None:
        """See DeleteRun in trainer.proto.

        Args:
            letting_go: gives, by the run's name, what is entered while its folder goes; may refuse.

        Raises:
            NotFound, FailedPrecondition, DataLoss: as the contract says.
            Unavailable: a cluster does not answer, or the folder cannot be renamed; the run is as it was.
        """
        record = self._over(name)
        with letting_go(name):
            self._remove_from_executors(record)
            aside = self._let_go(record)
        if aside is not None:
            discard(aside)
        log.info("run deleted", extra={"run": name})

    def _remove_from_executors(self, record: RunRecord) -> None:
        ran = {attempt.spec.executor for attempt in record.attempts()}
        for executor in (self._executors[kind] for kind in self._executors if kind in ran):
            try:
                executor.remove(record)
            except ExecutorAway as away:
                raise Unavailable(str(away), reason="EXECUTOR_AWAY") from None

    def _let_go(self, record: RunRecord) -> Path | None:
        """Forget a run; gives what its folder is called now, None where there was none."""
        name = record.name
        with self._lock:
            if self._over(name).token != record.token:
                raise FailedPrecondition(f"run: {name!r} was started again", reason="RUN_IS_ACTIVE")
            try:
                aside = set_aside(self._folders.run(name))
            except OSError as error:
                raise Unavailable(f"the run's folder stays: {error.strerror}", reason="NOT_WRITTEN") from None
            self._forget(self._records.pop(name))
        return aside

    def _over(self, name: str) -> RunRecord:
        record = self.get(name)
        if not record.state.is_over:
            raise FailedPrecondition(f"run: {name!r} is {record.state}: cancel it first", reason="RUN_IS_ACTIVE")
        return record

    def progress(self, record: RunRecord) -> Progress | None:
        """How far a run is."""
        return self._progress.read(self._folders.run(record.name))

    def queue_position(self, record: RunRecord) -> int:
        """From 1; 0: it does not wait here."""
        return next((i for i, r in enumerate(self._queue(record.spec.executor), 1) if r.name == record.name), 0)

    def all(self) -> list[RunRecord]:
        """Every run."""
        return list(self._records.copy().values())

    def reconcile(self, kind: ExecutorKind) -> None:
        """Look at what an executor does, and have it do what the records say."""
        executor = self._executors[kind]
        for record in self.all():
            if record.spec.executor == kind and record.launched and not record.state.is_over:
                try:
                    self._follow(record, executor)
                except ExecutorAway as away:
                    self._change(record, status=str(away))
                except ExecutorError as error:
                    self._end(record, RunState.FAILED, error=str(error))
                except Exception:  # the others are looked at all the same
                    log.exception("run not followed", extra={"run": record.name})
        for record in self._launchable(kind, executor.max_runs):
            self._launch(record, executor)

    def _follow(self, record: RunRecord, executor: Executor) -> None:
        seen = executor.observe(record)
        match seen.phase:
            case Phase.OVER:
                self._settle(record, seen)
            case Phase.ABSENT if record.cancel_asked_s is not None:
                with suppress(ExecutorAway):
                    executor.kill(record)  # a service that has died may have started it a moment ago
                self._end(record, RunState.CANCELLED)
            case Phase.ABSENT if record.state == RunState.RUNNING:
                executor.kill(record)  # its folder may be what is gone
                self._end(record, RunState.FAILED, error="is gone")
            case Phase.ABSENT:
                self._launch(record, executor)
            case _:
                self._see(record, seen)
                self._stop(record, executor)

    def _see(self, record: RunRecord, seen: Observed) -> None:
        is_running = seen.phase == Phase.RUNNING
        started_s = record.started_s or (time.time() if is_running else None)
        self._change(
            record,
            state=RunState.RUNNING if is_running else RunState.QUEUED,
            started_s=started_s,
            place=seen.place,
            status=seen.status,
        )

    def _stop(self, record: RunRecord, executor: Executor) -> None:
        if record.cancel_asked_s is None:
            return
        if record.token not in self._stopped and executor.stop(record):
            self._stopped.add(record.token)
        elif time.time() - record.cancel_asked_s > self._cancel_grace_s:
            executor.kill(record)

    def _settle(self, record: RunRecord, seen: Observed) -> None:
        """What an attempt's end means: one that is asked to end saves its state and ends well, too."""
        is_complete = self._examples_left(record) == 0
        if seen.succeeded and (not seen.asked_to_end or is_complete):
            self._end(record, RunState.SUCCEEDED, ended_s=seen.ended_s)
        elif record.cancel_asked_s is not None:
            self._end(record, RunState.CANCELLED, ended_s=seen.ended_s)
        else:
            error = _SOMEBODY_ELSE if seen.succeeded else seen.error
            self._end(record, RunState.FAILED, ended_s=seen.ended_s, error=error, exit_code=seen.exit_code)

    def _end(self, record: RunRecord, state: RunState, *, ended_s: float | None = None, **ending: Any) -> None:
        """Write down that an attempt is over; `ending` is its error and its exit code, where it has them."""
        self._stopped.discard(record.token)
        self._change(record, state=state, ended_s=ended_s or time.time(), status="", **ending)
        log.info("run ended", extra={"run": record.name, "state": state.value, "attempt": record.attempt})

    def _launchable(self, kind: ExecutorKind, max_runs: int) -> list[RunRecord]:
        """Those whose turn it is; that it is, is written down before anything is done."""
        with self._lock:
            at_work = sum(r.launched and not r.state.is_over for r in self._records.values() if r.spec.executor == kind)
            queue = self._queue(kind)
            turns = queue if not max_runs else queue[: max(0, max_runs - at_work)]
            launched = [replace(record, launched=True) for record in turns]
            for record in launched:
                self._write(record)
                self._remember(record)
        return launched

    def _launch(self, record: RunRecord, executor: Executor) -> None:
        try:
            check_name(record.name)
            check_spec(record.spec, self._folders)  # as at `start`: others can write into the folders of runs
            executor.launch(record)
        except (ExecutorError, InvalidArgument) as error:
            self._end(record, RunState.FAILED, error=str(error))
        except ExecutorAway as away:
            self._change(record, status=str(away))
        else:
            log.info("run launched", extra={"run": record.name, "attempt": record.attempt})

    def _queue(self, kind: ExecutorKind | None) -> list[RunRecord]:
        waiting = [
            record
            for record in self.all()
            if record.spec.executor == kind and record.state == RunState.QUEUED and not record.launched
        ]
        return sorted(waiting, key=lambda record: record.queued_s)

    def _next(self, name: str, spec: RunSpec) -> RunRecord:
        """The record of a run's first attempt, or of its next one."""
        if name in self._damaged:
            raise DataLoss(f"run: the record of {name!r} is damaged")
        now, token, before = time.time(), uuid.uuid4().hex, self._records.get(name)
        if before is None:
            check_folder(self._folders.run(name))
            return RunRecord(
                name=name, spec=spec, state=RunState.QUEUED, attempt=1, token=token, created_s=now, queued_s=now
            )
        if not before.state.is_over:
            raise AlreadyExists(f"run: {name!r} is {before.state}", reason="RUN_IS_ACTIVE")
        for field in _KEPT:
            was, asked = getattr(before.spec, field), getattr(spec, field)
            if was != asked:
                raise AlreadyExists(
                    f"spec.{field}: run {name!r} was begun with {was!r}, not {asked!r}", reason="RUN_DIFFERS"
                )
        following = RunRecord(
            name=name,
            spec=spec,
            state=RunState.QUEUED,
            attempt=before.attempt + 1,
            token=token,
            created_s=before.created_s,
            queued_s=now,
            requests=before.requests,
            earlier=(*before.earlier, before.as_earlier())[-MAX_EARLIER:],
        )
        if before.state == RunState.SUCCEEDED and self._examples_left(following) == 0:
            raise AlreadyExists(f"run: {name!r} has seen all its examples", reason="RUN_IS_COMPLETE")
        return following

    def _examples_left(self, record: RunRecord) -> int:
        progress = self.progress(record)
        return max(0, total_examples(record.spec) - (progress.examples if progress else 0))

    def _known(self, request_id: str, digest: str) -> RunRecord | None:
        """The run that a request has started; None: it has started none."""
        if request_id not in self._requests:
            return None
        name, known = self._requests[request_id]
        if known != digest:
            raise InvalidArgument(
                "request_id",
                f"{request_id} is the id of a request with other content, which started run {name!r}",
                reason="REQUEST_ID_REUSED",
            )
        return self._records[name]

    def _change(self, record: RunRecord, **changes: Any) -> None:
        """Change the record, as far as it is still of the same attempt."""
        with self._lock:
            current = self._records.get(record.name)
            if current is None or current.token != record.token or current.state.is_over:
                return
            changed = replace(current, **changes)
            if changed != current:
                try:
                    self._write(changed)  # before anyone is told
                except Unavailable as error:  # what is seen can be seen again
                    log.error("run not written", extra={"run": record.name, "error": error.description})
                self._remember(changed)

    def _write(self, record: RunRecord) -> None:
        try:
            write_record(record, self._folders.run(record.name))
        except OSError as error:
            raise Unavailable(f"the run cannot be written down: {error.strerror}", reason="NOT_WRITTEN") from None

    def _remember(self, record: RunRecord) -> None:
        before = self._records.get(record.name)
        if before is not None and before.requests != record.requests:
            self._forget(before)
        self._records[record.name] = record
        self._requests |= {request: (record.name, digest) for request, digest in record.requests.items()}

    def _forget(self, record: RunRecord) -> None:
        """What requests have named the run."""
        for request in record.requests:
            self._requests.pop(request, None)

    def _load(self, name: str) -> None:
        try:
            record = read_record(self._folders.run(name))
        except ValueError as error:
            log.error("run passed over: its record is damaged", extra={"run": name, "error": str(error)})
            self._damaged[name] = str(error)
            return
        if record is not None:
            self._remember(record)
