"""What Prometheus is told of runs: states, causes, presets, ages. No process is started here."""

from __future__ import annotations

import os

import pytest
from prometheus_client import CollectorRegistry

from tests.trainer.test_trainer_runs import SPEC, Obedient, folders, opened, wrote
from trainer.service.executor import Observed, Phase
from trainer.service.metrics import RunMetrics
from trainer.service.run_spec import ExecutorKind
from trainer.service.spec_rules import Folders

assert folders  # the fixture


def test_figures_of_runs_that_train_are_by_preset(folders: Folders) -> None:
    runs = opened(folders, Obedient(folders, max_runs=0))
    registry = CollectorRegistry()
    RunMetrics(runs, folders.run, registry)
    for name in ("a", "b", "c"):
        runs.start(name, SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    for name, loss in (("a", 0.5), ("b", 0.25)):
        wrote(folders, name, {"step": 1, "examples": 8, "loss": loss, "examples_per_s": 10.0})
    label = {"preset": "tiny-64"}
    assert registry.get_sample_value("reimagen_trainer_runs", {"state": "running"}) == 3
    assert registry.get_sample_value("reimagen_trainer_runs", {"state": "failed"}) == 0
    assert registry.get_sample_value("reimagen_trainer_runs_examples_per_second", label) == 20.0
    assert registry.get_sample_value("reimagen_trainer_runs_loss", label) == 0.375


def test_the_run_that_is_furthest_behind_tells_the_age_of_its_preset(folders: Folders) -> None:
    runs = opened(folders, Obedient(folders, max_runs=0))
    registry = CollectorRegistry()
    RunMetrics(runs, folders.run, registry)
    names = ("progress", "checkpoint")

    def ages() -> list[float | None]:
        labels = {"preset": "tiny-64"}
        return [registry.get_sample_value(f"reimagen_trainer_runs_{name}_timestamp_seconds", labels) for name in names]

    assert ages() == [None, None], "nothing runs"
    for name in ("a", "b"):
        runs.start(name, SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    runs.reconcile(ExecutorKind.LOCAL)
    began_s = min(runs.get(name).started_s for name in ("a", "b"))
    assert ages() == [began_s, began_s], "one that has just begun is not late"
    later_s = began_s + 1000
    for name in ("a", "b"):
        state = folders.run(name) / "state-00000001.safetensors"
        state.touch()
        os.utime(state, (later_s, later_s))
        if name == "a":
            began_b_s = runs.get("b").started_s
            assert ages() == [began_s, began_b_s]
    assert ages() == [began_s, later_s]


@pytest.mark.parametrize(
    ("code", "error", "cause"),
    [
        (3, "BackoffLimitExceeded", "hung"),
        (2, "PodFailurePolicy", "bad_input"),
        (4, "ended with status 4", "full_disk"),
        (23, "ended with status 23", "other"),
        (1, "ended with status 1\nrank 1 has not finished step 7 for 300 s; this rank ends", "other"),
        (-9, "was ended by SIGKILL, or memory ran out", "other"),
        (None, "ended with status 2", "other"),
    ],
)
def test_why_runs_fail_is_told_by_their_status_alone(
    folders: Folders, code: int | None, error: str, cause: str
) -> None:
    executor = Obedient(folders)
    runs = opened(folders, executor)
    registry = CollectorRegistry()
    RunMetrics(runs, folders.run, registry)
    runs.start("a", SPEC, "")
    runs.reconcile(ExecutorKind.LOCAL)
    executor.seen["a"] = Observed(phase=Phase.OVER, error=error, exit_code=code)
    runs.reconcile(ExecutorKind.LOCAL)
    assert opened(folders).get("a").exit_code == code, "which the next service knows"
    for each in ("hung", "bad_input", "full_disk", "other"):
        value = registry.get_sample_value("reimagen_trainer_runs_failed", {"cause": each})
        assert value == (1 if each == cause else 0)
