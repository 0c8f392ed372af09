"""`python -m trainer serve`: what is wrong with the settings ends it with one line and status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.service.__main__ import main

CLUSTER = {
    "kubernetes-namespace": "training",
    "kubernetes-image": "registry.example/reimagen-trainer:1",
    "kubernetes-claim": "shared",
    "kubernetes-mount": "{folder}",
}


@pytest.fixture(autouse=True)
def leave_the_logs_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command takes over the logs of its process, which here are pytest's."""
    monkeypatch.setattr("trainer.service.__main__.configure_logs", lambda **settings: None)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, flags: dict[str, str]) -> str:
    """What it says, in one line."""
    given = {name: str(folder / name) for name in ("runs", "data", "weights")} | {"address": f"unix:{folder}/t.sock"}
    given |= {name: value.format(folder=folder) for name, value in flags.items()}
    assert main([f"--{name}={value}" for name, value in given.items()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1, said
    return said.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"max-runs": "-1"}, "--max-runs: -1 is not 0 or more"),
        ({"max-runs": "two"}, "--max-runs: 'two' is not a whole number"),
        ({"poll-s": "0"}, "--poll-s: 0.0 is not positive"),
        ({"cancel-grace-s": "nan"}, "--cancel-grace-s: nan is not 0 or more"),
        ({"executor": "moon"}, "--executor: 'moon' is not one of local, kubernetes_job"),
        ({"executor": "kubernetes_job"}, "--executor: kubernetes_job is not configured"),
        ({"local-runs": "false"}, "--executor: local is not configured"),
        ({"data": "{folder}/file"}, "file is not a folder"),
        ({"kubernetes-namespace": "training"}, "--kubernetes-image: missing; --kubernetes-namespace needs it"),
        (CLUSTER | {"weights": "/elsewhere"}, "--weights: /elsewhere is not under --kubernetes-mount"),
        (CLUSTER | {"kubernetes-config": "{folder}/file"}, "--kubernetes-config: {folder}/file: "),
        (CLUSTER | {"kubernetes-config": "{folder}/nowhere"}, "--kubernetes-config: {folder}/nowhere: "),
        (CLUSTER, "--kubernetes-config: that of the pod: Service host/port is not set"),
        ({"address": "unix:/nowhere/t.sock"}, "the folder of 'unix:/nowhere/t.sock' does not exist"),
    ],
)
def test_bad_settings_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: dict[str, str], named: str
) -> None:
    (tmp_path / "file").write_text("neither a folder nor a kubeconfig")
    assert named.format(folder=tmp_path) in refused(capsys, tmp_path, flags)


def test_a_setting_that_is_missing_or_unknown_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 2
    assert "--runs: missing; give it, or set REIMAGEN_TRAINER_RUNS" in capsys.readouterr().err
    monkeypatch.setenv("REIMAGEN_TRAINER_MAX_RUN", "1")
    assert "REIMAGEN_TRAINER_MAX_RUN: no such setting" in refused(capsys, tmp_path, {})
