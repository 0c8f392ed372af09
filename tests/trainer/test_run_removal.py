"""Runs that are deleted: all of it or nothing, whatever happens beside it. No process is started here."""

from __future__ import annotations

import fcntl
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from common.service.errors import DataLoss, FailedPrecondition, NotFound, ServiceError, Unavailable
from tests.trainer.test_trainer_runs import OTHER, REQUEST, SPEC, Obedient, folders, opened, reason
from trainer.service import runs as runs_module
from trainer.service.executor import ExecutorAway, Observed, Phase
from trainer.service.exports import Exports, ExportState
from trainer.service.run_record import FOLDER, RECORD, RunRecord, RunState
from trainer.service.run_spec import ExecutorKind
from trainer.service.runs import Runs
from trainer.service.spec_rules import Folders

assert folders  # the fixture


class Watched(Obedient):
    """Says which runs it was told to remove, and may be away."""

    def __init__(self, folders: Folders) -> None:
        super().__init__(folders)
        self.removed: list[list[int]] = []
        self.is_away = False

    def remove(self, record: RunRecord) -> None:
        if self.is_away:
            raise ExecutorAway("the cluster does not answer: 503")
        self.removed.append([each.attempt for each in record.attempts()])


def delete(runs: Runs, name: str) -> None:
    runs.delete(name, letting_go=lambda _: nullcontext())


def ended(folders: Folders, executor: Obedient | None = None) -> Runs:
    """Run "a", of two attempts, is over; its folder holds what it has saved."""
    executor = executor or Obedient(folders)
    runs = opened(folders, executor)
    for request in (REQUEST, OTHER):
        runs.start("a", SPEC, request)
        runs.reconcile(ExecutorKind.LOCAL)
        executor.seen["a"] = Observed(phase=Phase.OVER, error="why", exit_code=1)
        runs.reconcile(ExecutorKind.LOCAL)
        executor.seen.clear()
    (folders.run("a") / "state-00000001.safetensors").write_bytes(b"0" * 10)
    return runs


def test_a_deleted_run_is_gone_and_its_name_and_its_requests_are_free(folders: Folders) -> None:
    executor = Watched(folders)
    runs = ended(folders, executor)
    delete(runs, "a")
    assert executor.removed == [[2, 1]], "what its attempts have left in a cluster"
    assert list(folders.runs.iterdir()) == []
    for service in (runs, opened(folders)):
        assert service.all() == []
        with pytest.raises(NotFound):
            delete(service, "a")
    again = runs.start("a", SPEC, REQUEST)
    assert (again.attempt, again.state) == (1, RunState.QUEUED)


def test_one_that_is_not_over_is_refused(folders: Folders) -> None:
    executor = Watched(folders)
    runs = opened(folders, executor)
    runs.start("a", SPEC, "")
    runs.start("b", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    runs.cancel("a")  # it saves its state
    for name, state in (("a", RunState.RUNNING), ("b", RunState.QUEUED)):
        with pytest.raises(FailedPrecondition, match="cancel it first") as refused:
            delete(runs, name)
        assert (reason(refused), runs.get(name).state) == ("RUN_IS_ACTIVE", state)
    assert executor.removed == []
    runs.cancel("b")
    delete(runs, "b")
    assert [run.name for run in opened(folders).all()] == ["a"]


def test_a_crash_in_the_middle_leaves_the_run_or_nothing(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(aside: Path) -> None:
        raise KeyboardInterrupt

    runs = ended(folders)
    monkeypatch.setattr(runs_module, "discard", ends)
    with pytest.raises(KeyboardInterrupt):
        delete(runs, "a")
    (rest,) = folders.runs.iterdir()
    assert rest.name.startswith(".a.") and (rest / "state-00000001.safetensors").is_file()
    assert opened(folders).all() == [] and list(folders.runs.iterdir()) == [], "the next service removes the rest"

    runs = ended(folders)
    monkeypatch.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(OSError(30, "Read-only")))
    with pytest.raises(Unavailable):
        delete(runs, "a")
    assert runs.get("a") == opened(folders).get("a")


def test_a_cluster_that_does_not_answer_keeps_the_run(folders: Folders) -> None:
    executor = Watched(folders)
    runs = ended(folders, executor)
    executor.is_away = True
    with pytest.raises(Unavailable, match="503") as refused:
        delete(runs, "a")
    assert reason(refused) == "EXECUTOR_AWAY"
    assert runs.get("a").attempt == 2 and (folders.run("a") / FOLDER / RECORD).is_file()


def test_a_run_whose_folder_was_removed_by_hand_is_forgotten(folders: Folders) -> None:
    runs = ended(folders)
    shutil.rmtree(folders.run("a"))
    delete(runs, "a")
    with pytest.raises(NotFound):
        runs.get("a")


def test_a_run_that_is_exported_loses_nothing_on_a_cluster(folders: Folders) -> None:
    executor = Watched(folders)
    runs = ended(folders, executor)

    @contextmanager
    def refusing(name: str) -> Iterator[None]:
        raise FailedPrecondition(f"run: {name!r} is exported", reason="EXPORT_UNDER_WAY")
        yield

    with pytest.raises(FailedPrecondition):
        runs.delete("a", letting_go=refusing)
    assert executor.removed == [] and runs.get("a").name == "a"


def test_a_folder_in_which_somebody_trains_stays(folders: Folders) -> None:
    runs = ended(folders)
    with (folders.run("a") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FailedPrecondition) as refused:
            delete(runs, "a")
        assert reason(refused) == "FOLDER_IN_USE" and runs.get("a")
    delete(runs, "a")


@pytest.mark.parametrize("name", ["prepared.json", "manifest.json"])
def test_a_corpus_or_weights_are_not_deleted_with_a_run(folders: Folders, name: str) -> None:
    runs = ended(folders)
    (folders.run("a") / name).touch()
    with pytest.raises(FailedPrecondition, match=name) as refused:
        delete(runs, "a")
    assert reason(refused) == "FOLDER_IN_USE" and (folders.run("a") / name).exists()


def test_a_run_that_is_exported_stays_until_that_is_over(folders: Folders) -> None:
    runs, exports = ended(folders), Exports(folders)
    found = runs.get("a")  # whoever asks for an export has found the run before
    export = exports.start(found, "w", REQUEST)
    with pytest.raises(FailedPrecondition) as refused:
        runs.delete("a", letting_go=exports.letting_go)
    assert reason(refused) == "EXPORT_UNDER_WAY" and runs.get("a")
    exports._change(export, state=ExportState.SUCCEEDED)
    runs.delete("a", letting_go=exports.letting_go)
    assert exports.get("a") is None
    with pytest.raises(FailedPrecondition) as refused:
        exports.start(found, "w", "")
    assert reason(refused) == "NOTHING_TO_EXPORT"
    assert not folders.run("a").exists(), "nothing of it comes back"


def test_what_was_seen_of_it_before_does_not_bring_it_back(folders: Folders) -> None:
    runs = ended(folders)
    before = runs.get("a")
    delete(runs, "a")
    runs._change(before, status="seen a moment ago")
    assert runs.all() == [] and list(folders.runs.iterdir()) == []


def test_one_that_is_started_again_meanwhile_stays(folders: Folders) -> None:
    runs = ended(folders)

    @contextmanager
    def restarted(name: str) -> Iterator[None]:
        runs.start(name, SPEC, "")
        yield

    with pytest.raises(FailedPrecondition) as refused:
        runs.delete("a", letting_go=restarted)
    assert reason(refused) == "RUN_IS_ACTIVE" and runs.get("a").attempt == 3
    assert (folders.run("a") / "state-00000001.safetensors").is_file()


def test_of_two_that_delete_it_one_does(folders: Folders) -> None:
    runs, together, told = ended(folders), threading.Barrier(2), list[str]()

    @contextmanager
    def both(name: str) -> Iterator[None]:
        together.wait(10.0)
        yield

    def ask() -> None:
        try:
            runs.delete("a", letting_go=both)
            told.append("")
        except ServiceError as error:
            told.append(type(error).__name__)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["", "NotFound"]


def test_a_damaged_record_is_not_deleted(folders: Folders) -> None:
    ended(folders)
    (folders.run("a") / FOLDER / RECORD).write_text("{")
    with pytest.raises(DataLoss):
        delete(opened(folders), "a")
    assert folders.run("a").is_dir()


def test_a_folder_that_is_a_link_loses_the_link_alone(folders: Folders, tmp_path: Path) -> None:
    ended(folders)
    folders.run("a").rename(tmp_path / "elsewhere")
    folders.run("a").symlink_to(tmp_path / "elsewhere")
    delete(opened(folders), "a")
    assert list(folders.runs.iterdir()) == [] and (tmp_path / "elsewhere" / "state-00000001.safetensors").is_file()
