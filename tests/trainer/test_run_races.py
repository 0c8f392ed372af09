"""What happens at the same time, and what others have written where runs are kept. No process is started here."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from reimagen.trainer.v1 import trainer_pb2 as pb

from common.service.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from tests.trainer.test_trainer_runs import OTHER, REQUEST, SPEC, Obedient, folders, opened, reason
from trainer.service import servicer as servicer_module
from trainer.service.executor import Observed, Phase
from trainer.service.exports import EXPORT, Exports, ExportState
from trainer.service.run_record import FOLDER, RECORD, RunRecord, RunState
from trainer.service.run_spec import ExecutorKind
from trainer.service.run_watch import RunWatch
from trainer.service.servicer import TrainerServicer
from trainer.service.spec_rules import Folders

assert folders  # the fixture


def test_one_request_that_comes_many_times_at_once_starts_one_run(folders: Folders) -> None:
    runs, together = opened(folders), threading.Barrier(8)

    def ask(request_id: str) -> str:
        together.wait(10.0)
        try:
            return f"{runs.start('a', SPEC, request_id).attempt}"
        except AlreadyExists as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, [REQUEST] * 8)) == {"1"}
    runs = opened(folders, Obedient(folders))
    runs.cancel("a")
    with ThreadPoolExecutor(8) as pool:
        told = sorted(pool.map(ask, [str(uuid.uuid4()) for _ in range(8)]))
    assert told == ["2", *["RUN_IS_ACTIVE"] * 7]


def test_a_run_that_is_cancelled_while_it_is_launched_ends(folders: Folders) -> None:
    """Whether it is seen afterwards, or not: then it may come yet."""

    class Slow(Obedient):
        def launch(self, record: RunRecord) -> None:
            assert runs.cancel(record.name).cancel_asked_s is not None
            super().launch(record)

    executor = Slow(folders)
    runs = opened(folders, executor)
    runs.start("a", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    assert executor.stopped == ["a"] and runs.get("a").state == RunState.RUNNING
    executor.seen["a"] = Observed(phase=Phase.ABSENT)
    runs.reconcile(ExecutorKind.LOCAL)
    assert executor.killed == ["a"] and runs.get("a").state == RunState.CANCELLED


@pytest.mark.parametrize("name", ["prepared.json", "manifest.json", "corpus.json", "notes.txt", "lock", "run.json"])
def test_a_run_does_not_take_a_folder_that_holds_something_else(folders: Folders, name: str) -> None:
    """Corpora may lie beside the runs: deleting a run of that name would delete them."""
    runs = opened(folders)
    folders.run("a").mkdir()
    (folders.run("a") / name).touch()
    with pytest.raises(InvalidArgument, match="holds something else than a run"):
        runs.start("a", SPEC, "")
    assert [path.name for path in folders.run("a").iterdir()] == [name]
    (folders.run("b")).mkdir()
    (folders.run("b") / "state-00000001.safetensors").touch()
    assert runs.start("b", SPEC, "").attempt == 1, "fit has filled it"


def test_what_a_newer_service_has_written_can_be_read(folders: Folders) -> None:
    run = opened(folders).start("a", SPEC, "")
    path = folders.run("a") / FOLDER / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "good"}))
    assert opened(folders).get("a") == run


def test_an_export_that_replaces_is_another_one(folders: Folders) -> None:
    run = opened(folders).start("a", SPEC, "")
    (folders.run("a") / "state-1.safetensors").touch()
    exports = Exports(folders)
    first = exports.start(run, "old", REQUEST)
    with pytest.raises(InvalidArgument) as refused:
        exports.start(run, "old", REQUEST, replace=True)
    assert reason(refused) == "REQUEST_ID_REUSED"
    with pytest.raises(FailedPrecondition) as refused:
        exports.start(run, "old", OTHER, replace=True)
    assert reason(refused) == "EXPORT_UNDER_WAY"
    exports._change(first, state=ExportState.FAILED)
    second = exports.start(run, "old", OTHER, replace=True)
    assert (first.replace, second.replace, Exports(folders).get("a")) == (False, True, second)


@pytest.mark.parametrize(
    ("name", "value", "is_known"),
    [
        ("weights", "../elsewhere", False),
        ("weights", "/etc", False),
        ("data", "../elsewhere", False),
        ("command", ["touch", "x"], True),
    ],
)
def test_what_is_written_in_a_runs_folder_runs_nothing_and_leads_nowhere(
    folders: Folders, name: str, value: Any, is_known: bool
) -> None:
    """Pods write there, too."""
    run = opened(folders).start("a", SPEC, "")
    (folders.run("a") / "state-1.safetensors").touch()
    Exports(folders).start(run, "old", "")
    path = folders.run("a") / FOLDER / EXPORT
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    found = Exports(folders).get("a")
    assert (found is not None) == is_known and not hasattr(found, "command")
    with pytest.raises(InvalidArgument, match=r"spec\.data"):
        Exports(folders).start(replace(run, spec=replace(run.spec, data="../elsewhere")), "new", "")


def test_a_page_is_no_larger_than_a_client_takes(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are long; whoever asks page by page is told of every run once."""
    executor = Obedient(folders, max_runs=0)
    runs = opened(folders, executor)
    for name in "abcde":
        runs.start(name, SPEC, "")
        executor.seen[name] = Observed(phase=Phase.OVER, error="why " * 200)
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    monkeypatch.setattr(servicer_module, "MAX_PAGE_BYTES", 2000)
    servicer = TrainerServicer(runs, Exports(folders), RunWatch(runs, root=folders.runs, poll_s=1.0))
    told, token = [], ""
    while not told or token:
        page = asyncio.run(servicer.ListRuns(pb.ListRunsRequest(page_token=token), None))  # type: ignore[arg-type]
        token = page.next_page_token
        told.append([run.name for run in page.runs])
    assert told == [["a", "b"], ["c", "d"], ["e"]]
