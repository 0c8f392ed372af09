"""What the service knows of its runs, on disk and in what they write: no process is started here."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from reimagen.trainer.v1 import trainer_pb2 as pb

from common.service.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    ServiceError,
    Unavailable,
)
from trainer.service.executor import ExecutorAway, Observed, Phase
from trainer.service.exports import EXPORT, Exports, ExportState
from trainer.service.local_runs import LocalRuns
from trainer.service.run_record import FOLDER, RECORD, RunRecord, RunState, read_record, write_record
from trainer.service.run_spec import ExecutorKind, PodResources, RunSpec
from trainer.service.runs import Runs
from trainer.service.spec_rules import Folders
from trainer.service.wire import MAX_DURATION_S, run_message, spec_of

REQUEST, OTHER = "0f4c4b86-6e9b-4b39-9a0e-0b5f8e0c7a11", "8b7d3c1e-1111-4222-8333-944455566677"
SPEC = RunSpec(preset="tiny-64", data="shapes")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """With what looks like prepared corpora and weights."""
    made = Folders(runs=tmp_path / "runs", data=tmp_path / "data", weights=tmp_path / "weights")
    made.runs.mkdir()
    for name in ("shapes", "letters"):
        (made.data / name).mkdir(parents=True)
        (made.data / name / "prepared.json").write_text("{}")
    (made.weights / "first").mkdir(parents=True)
    (made.weights / "first" / "manifest.json").write_text("{}")
    return made


class Obedient(LocalRuns):
    """Does nothing, and is seen to do what it was told."""

    def __init__(self, folders: Folders, max_runs: int = 1) -> None:
        super().__init__(folders, max_runs=max_runs, grace_s=60.0)
        self.seen: dict[str, Observed | Exception] = {}
        self.launched: list[str] = []
        self.stopped: list[str] = []
        self.killed: list[str] = []

    def launch(self, record: RunRecord) -> None:
        self.launched.append(record.name)
        self.seen.setdefault(record.name, Observed(phase=Phase.RUNNING, place="here"))

    def observe(self, record: RunRecord) -> Observed:
        seen = self.seen.get(record.name, Observed(phase=Phase.ABSENT))
        if isinstance(seen, Exception):
            raise seen
        return seen

    def stop(self, record: RunRecord) -> bool:
        self.stopped.append(record.name)
        return True

    def kill(self, record: RunRecord) -> None:
        self.killed.append(record.name)


def opened(folders: Folders, executor: LocalRuns | None = None) -> Runs:
    """What a service finds when it starts."""
    executors = {ExecutorKind.LOCAL: executor or Obedient(folders)}
    return Runs(folders, executors, default=ExecutorKind.LOCAL, cancel_grace_s=60.0)


def wrote(folders: Folders, name: str, *lines: dict[str, Any]) -> None:
    """The run has logged these lines."""
    with (folders.run(name) / "log.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"time": 1.0, "kind": "train"} | line) + "\n" for line in lines)


def reason(refused: pytest.ExceptionInfo[ServiceError]) -> str:
    return refused.value.reason


def test_records_are_kept_whole(folders: Folders) -> None:
    record = RunRecord(
        name="a",
        spec=replace(
            SPEC,
            executor=ExecutorKind.KUBERNETES_JOB,
            ranks=2,
            limit_s=1.5,
            pod=PodResources(gpus=1, memory_bytes=2**40),
        ),
        state=RunState.FAILED,
        attempt=3,
        token="t",
        created_s=1.0,
        queued_s=2.0,
        requests={REQUEST: "digest"},
        launched=True,
        started_s=3.0,
        error="why",
    )
    write_record(record, folders.run("a"))
    assert read_record(folders.run("a")) == record
    assert read_record(folders.run("b")) is None


def test_what_was_asked_is_known_to_the_next_service(folders: Folders) -> None:
    runs = opened(folders)
    first = runs.start("a", SPEC, REQUEST)
    again = opened(folders)
    assert again.get("a") == first
    assert again.start("a", SPEC, REQUEST.upper()) == first
    with pytest.raises(InvalidArgument) as refused:
        again.start("b", SPEC, REQUEST)
    assert reason(refused) == "REQUEST_ID_REUSED"


def test_a_run_without_a_name_gets_one_that_its_request_decides(folders: Folders) -> None:
    runs = opened(folders)
    assert re.fullmatch("tiny-64-[0-9a-f]{8}", runs.start("", SPEC, REQUEST).name)
    assert runs.start("", SPEC, REQUEST).name == runs.start("", SPEC, REQUEST.upper()).name
    same_minute = [f"01932b8e-{part}-7000-8000-000000000001" for part in ("1c00", "9fff")]  # UUIDv7
    assert len({runs.start("", SPEC, request_id).name for request_id in same_minute}) == 2
    assert runs.start("", SPEC, "").name != runs.start("", SPEC, "").name


def test_a_run_that_succeeded_goes_on_only_where_examples_are_left(folders: Folders) -> None:
    executor = Obedient(folders)
    runs = opened(folders, executor)
    runs.start("a", replace(SPEC, examples=64), REQUEST)
    runs.reconcile(ExecutorKind.LOCAL)
    wrote(folders, "a", {"step": 8, "examples": 64, "loss": 0.5})
    executor.seen["a"] = Observed(phase=Phase.OVER, succeeded=True, ended_s=9.0)
    runs.reconcile(ExecutorKind.LOCAL)
    assert (runs.get("a").state, runs.get("a").ended_s) == (RunState.SUCCEEDED, 9.0)
    with pytest.raises(AlreadyExists) as refused:
        runs.start("a", replace(SPEC, examples=64), "")
    assert reason(refused) == "RUN_IS_COMPLETE"
    for change in ({"data": "letters"}, {"preset": "tiny-256"}, {"start_from": "first"}):
        with pytest.raises(AlreadyExists) as refused:
            runs.start("a", replace(SPEC, **change), "")
        assert reason(refused) == "RUN_DIFFERS"
    assert runs.start("a", replace(SPEC, examples=64), REQUEST).attempt == 1, "the first request, again"
    following = runs.start("a", replace(SPEC, examples=128), OTHER)
    assert (following.attempt, following.state, following.launched) == (2, RunState.QUEUED, False)
    assert set(following.requests) == {REQUEST, OTHER} and following.token != opened(folders).get("a").name


@pytest.mark.parametrize(
    ("asked", "seen", "examples", "state"),
    [
        (False, {"succeeded": True}, 64, RunState.SUCCEEDED),  # its time was up
        (False, {"succeeded": False, "error": "why"}, 64, RunState.FAILED),
        (False, {"succeeded": True, "asked_to_end": True}, 64, RunState.FAILED),  # by nobody of ours
        (True, {"succeeded": True, "asked_to_end": True}, 64, RunState.CANCELLED),
        (True, {"succeeded": False, "asked_to_end": True}, 64, RunState.CANCELLED),
        (True, {"succeeded": True, "asked_to_end": True}, 128, RunState.SUCCEEDED),  # it was done already
        (True, {"succeeded": True}, 128, RunState.SUCCEEDED),
    ],
)
def test_what_an_end_means(folders: Folders, asked: bool, seen: dict[str, Any], examples: int, state: RunState) -> None:
    executor = Obedient(folders)
    runs = opened(folders, executor)
    runs.start("a", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    wrote(folders, "a", {"step": examples // 8, "examples": examples, "loss": 0.5})
    if asked:
        runs.cancel("a")
        runs.reconcile(ExecutorKind.LOCAL)
        runs.reconcile(ExecutorKind.LOCAL)
        assert executor.stopped == ["a"], "once"
    executor.seen["a"] = Observed(phase=Phase.OVER, **seen)
    runs.reconcile(ExecutorKind.LOCAL)
    assert runs.get("a").state == state
    assert bool(runs.get("a").error) == (state == RunState.FAILED)


def test_turns_are_taken_in_order_and_written_down_before_they_are_used(folders: Folders) -> None:
    executor = Obedient(folders, max_runs=2)
    runs = opened(folders, executor)
    for name in ("d", "c", "b", "a"):
        runs.start(name, SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    assert executor.launched == ["d", "c"]
    assert [runs.queue_position(runs.get(name)) for name in "abcd"] == [2, 1, 0, 0]
    # The service ends between writing down and launching: the next one launches, and no third one.
    following = Obedient(folders, max_runs=2)
    later = opened(folders, following)
    later.reconcile(ExecutorKind.LOCAL)
    assert following.launched == ["c", "d"]


def test_an_executor_that_is_away_says_so_and_changes_nothing(folders: Folders) -> None:
    executor = Obedient(folders)
    runs = opened(folders, executor)
    runs.start("a", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    executor.seen["a"] = ExecutorAway("nobody answers")
    runs.reconcile(ExecutorKind.LOCAL)
    assert (runs.get("a").state, runs.get("a").status) == (RunState.RUNNING, "nobody answers")
    executor.seen["a"] = Observed(phase=Phase.RUNNING, place="here")
    runs.reconcile(ExecutorKind.LOCAL)
    assert runs.get("a").status == ""


def test_a_run_whose_executor_is_configured_no_more_is_cancelled(folders: Folders) -> None:
    executors = {kind: Obedient(folders) for kind in (ExecutorKind.LOCAL, ExecutorKind.KUBERNETES_JOB)}
    before = Runs(folders, executors, default=ExecutorKind.LOCAL, cancel_grace_s=60.0)
    before.start("a", replace(SPEC, executor=ExecutorKind.KUBERNETES_JOB), "")
    runs = opened(folders)
    told: list[ExecutorKind] = []
    runs.on_change = told.append
    assert runs.cancel("a").state == RunState.CANCELLED
    assert told == [], "nobody listens for that kind"


def test_every_time_that_is_taken_can_be_told(folders: Folders) -> None:
    runs = opened(folders)
    longest = Duration(seconds=MAX_DURATION_S)
    run = runs.start("a", spec_of(pb.RunSpec(preset="tiny-64", data="shapes", limit=longest)), "")
    told = run_message(run, progress=None, queue_position=0, export=None)
    assert told.spec.limit == longest
    for beyond in (Duration(seconds=MAX_DURATION_S, nanos=10**9), Duration(seconds=MAX_DURATION_S + 1)):
        with pytest.raises(InvalidArgument, match=r"spec\.limit"):
            spec_of(pb.RunSpec(preset="tiny-64", data="shapes", limit=beyond))


def test_one_that_cannot_be_looked_at_holds_no_other_up(folders: Folders) -> None:
    executor = Obedient(folders, max_runs=0)
    runs = opened(folders, executor)
    for name in ("a", "b"):
        runs.start(name, SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    executor.seen["a"] = RuntimeError("a fault of ours")
    runs.reconcile(ExecutorKind.LOCAL)
    assert (runs.get("a").state, runs.get("b").state) == (RunState.QUEUED, RunState.RUNNING)


def test_one_that_is_gone_leaves_nothing_behind(folders: Folders) -> None:
    executor = Obedient(folders)
    runs = opened(folders, executor)
    runs.start("a", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    executor.seen["a"] = Observed(phase=Phase.ABSENT)
    runs.reconcile(ExecutorKind.LOCAL)
    assert (runs.get("a").state, runs.get("a").error, executor.killed) == (RunState.FAILED, "is gone", ["a"])


def test_a_damaged_record_is_told_and_hides_no_other(folders: Folders) -> None:
    runs = opened(folders)
    for name in ("a", "b"):
        runs.start(name, SPEC, "")
    path = folders.run("a") / FOLDER / RECORD
    path.write_text(path.read_text()[:40])
    later = opened(folders)
    assert later.get("b").state == RunState.QUEUED
    for ask in (lambda: later.get("a"), lambda: later.cancel("a"), lambda: later.start("a", SPEC, "")):
        with pytest.raises(DataLoss, match="damaged"):
            ask()
    with pytest.raises(NotFound):
        later.get("c")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data", "../weights/first", "spec.data: '../weights/first' is not a folder under the service's data folder"),
        ("data", "/etc", "spec.data: '/etc' is not a folder under the service's data folder"),
        ("data", "nowhere", "spec.data: 'nowhere' holds no prepared corpus"),
        ("start_from", "../data/shapes", "spec.start_from: '../data/shapes' is not a folder under"),
        ("ranks", 4096, "spec.ranks: 4096 ranks"),
    ],
)
@pytest.mark.parametrize("launched", [False, True])
def test_what_others_have_written_into_a_record_is_checked_before_it_is_launched(
    folders: Folders, field: str, value: Any, said: str, launched: bool
) -> None:
    """Pods write where records lie. Also one whose turn has come, and that was not launched yet."""
    runs = opened(folders)
    for name in ("a", "b"):
        runs.start(name, SPEC, "")
    path = folders.run("a") / FOLDER / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"spec": record["spec"] | {field: value}, "launched": launched}))
    executor = Obedient(folders, max_runs=0)
    later = opened(folders, executor)
    later.reconcile(ExecutorKind.LOCAL)
    assert executor.launched == ["b"], "the other is not held up"
    assert later.get("a").state == RunState.FAILED and later.get("a").error.startswith(said)


@pytest.mark.parametrize(("field", "value"), [("data", 5), ("examples", "8"), ("ranks", -1), ("limit_s", float("nan"))])
def test_a_record_of_other_kinds_of_values_is_damaged(folders: Folders, field: str, value: Any) -> None:
    opened(folders).start("a", SPEC, "")
    path = folders.run("a") / FOLDER / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"spec": record["spec"] | {field: value}}))
    with pytest.raises(DataLoss):
        opened(folders).get("a")


def test_the_copy_of_a_folder_does_not_speak_for_its_run(folders: Folders) -> None:
    runs = opened(folders)
    run = runs.start("a", SPEC, "")
    (folders.run("a") / "state-1.safetensors").touch()
    Exports(folders).start(run, "old", "")
    for copied in ("a.bak", "b"):
        shutil.copytree(folders.run("a"), folders.run(copied))
    runs.cancel("a")
    (folders.run("a") / FOLDER / EXPORT).unlink()
    later = opened(folders)
    assert [(run.name, run.state) for run in later.all()] == [("a", RunState.CANCELLED)]
    with pytest.raises(DataLoss):
        later.get("b")
    assert Exports(folders).get("a") is None


def test_exports_that_requests_have_named_are_not_made_again(folders: Folders) -> None:
    """Nor by the next service, nor where another has been made since, nor where a request has joined the first."""
    run = opened(folders).start("a", SPEC, "")
    (folders.run("a") / "state-1.safetensors").touch()
    exports = Exports(folders)
    first = exports.start(run, "old", REQUEST)
    assert exports.start(run, "old", OTHER).token == first.token, "joined"
    exports._change(first, state=ExportState.SUCCEEDED, status="old/unet_64.safetensors")
    named = "11111111-1111-4111-8111-111111111111"
    second = exports.start(run, "new", named)
    for service in (exports, Exports(folders)):
        for request_id in (REQUEST, OTHER):
            again = service.start(run, "old", request_id)
            assert (again.token, again.state) == (first.token, ExportState.SUCCEEDED)
            with pytest.raises(InvalidArgument) as refused:
                service.start(run, "new", request_id)
            assert reason(refused) == "REQUEST_ID_REUSED"
        assert service.start(run, "new", named) == service.get("a") == second


def test_a_run_that_cannot_be_written_down_is_not_started(folders: Folders) -> None:
    runs = opened(folders)
    folders.run("a").write_text("a file where a folder is needed")
    with pytest.raises(Unavailable) as refused:
        runs.start("a", SPEC, REQUEST)
    assert reason(refused) == "NOT_WRITTEN"
    folders.run("a").unlink()
    assert runs.start("a", SPEC, REQUEST).attempt == 1
