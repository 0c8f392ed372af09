"""`reimagen train` and the trainer's clients against the real service, with a real training: what README.md shows."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reimagen.trainer.v1 import trainer_pb2
from rich.console import Console

from client import AsyncClient, Client, RunSpec, TrainingFailed
from client.__main__ import main
from client.message_fields import FieldError
from client.run_cursor import RunCursor
from client.train_command import _followed
from client.train_display import TrainBar
from client.trainer import Figures, Run, SampleGrid
from client.training_calls import run_of
from common.checkpoint import load_stage
from tests.client.test_readme import blocks
from tests.trainer.training_service import TrainerProcess, training

ADDRESS, PRESET = "127.0.0.1:50059", "demo-64"
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def service(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A trainer whose data folder holds `prepared`."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "data").mkdir()
    (folder / "data" / "prepared").symlink_to(prepared_folder)
    with training(folder / "t", folder / "data") as (running, _):
        yield running


def ran(service: TrainerProcess, command: list[str], code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What code says in a folder, about this trainer and the tiny preset instead of the README's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = code.replace(ADDRESS, service.address).replace(PRESET, "tiny-64")
    done = subprocess.run(
        [*command, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def commanded(service: TrainerProcess, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the README's commands say."""
    return ran(service, ["bash", "-e", "-u", "-c"], blocks("sh")[2], folder)


@pytest.fixture
def reimagen(
    service: TrainerProcess, commanded: object, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments], {"REIMAGEN_TRAINER": service.address})
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_readmes_commands(
    commanded: subprocess.CompletedProcess[str], service: TrainerProcess, folder: Path
) -> None:
    out = commanded.stdout.splitlines()
    assert out[0] == "grids/samples-000000128.png"
    with Image.open(folder / "grids" / "samples-000000128.png") as picture:
        assert picture.format == "PNG"
    assert out[1].split("\t")[:5] == ["first", "succeeded", "tiny-64", "128", "128"]
    document = json.loads("\n".join(out[2 : out.index("}") + 1]))
    assert (document["name"], document["spec"]["limit_s"], document["export"]) == ("first", 3600.0, None)
    assert out[out.index("}") + 1 :] == [
        "exported/first/unet_64.safetensors",
        "second",
        "third",
        "third",
        "third",
        "second",
    ]
    assert load_stage(service.weights / "exported" / "first", 64).trained["examples"] == 128
    for line in (
        "first running, process ",
        "step 16  128 examples  held out  full 0.",
        "step 16  128 examples  samples",
    ):
        assert line in commanded.stderr
    assert "export to exported/first: running 1/2 reading the run's newest state" in commanded.stderr


def test_the_readmes_program(commanded: object, service: TrainerProcess, folder: Path) -> None:
    said = ran(service, [sys.executable, "-c"], blocks("python")[2], folder).stdout
    assert said.startswith("queued ") and "Figures(kind='held_out', step=16" in said
    assert "first Progress(step=16, examples=128" in said and "exported/first/unet_64.safetensors" in said


def test_asyncio_is_told_the_same(commanded: object, service: TrainerProcess) -> None:
    async def asked() -> tuple[list[Any], list[Run], Run, Any, Any]:
        async with AsyncClient(trainer=service.address) as client:
            trainer = client.trainer
            events = [event async for event in trainer.watch("first")]
            listed = [run async for run in trainer.list(page_size=1)]
            health = await client.health()
            with pytest.raises(TrainingFailed) as refused:
                await trainer.export("first", "/etc")
            with pytest.raises(TrainingFailed) as twice:
                await trainer.start(RunSpec(preset="tiny-64", data="prepared"), name="first")
            assert (twice.value.code, twice.value.reason) == ("ALREADY_EXISTS", "RUN_IS_COMPLETE")
            with pytest.raises(TrainingFailed):
                await trainer.cancel("first")
            return events, listed, await trainer.get("first"), health, refused.value

    with Client(trainer=service.address) as client:
        list(client.trainer.watch("second"))  # to its end: while the commands' cancel is under way, it changes
        events, listed, run, health, refused = asyncio.run(asked())
        assert list(client.trainer.watch("first")) == events
        assert list(client.trainer.list()) == listed and client.trainer.get("first") == run
        assert client.health() == health and health[0].is_serving
    assert {type(event) for event in events} == {Run, Figures, SampleGrid}
    assert [violation.field for violation in refused.violations] == ["weights"]


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["start", "--preset", "tiny-65", "--data", "prepared"], 2, "spec.preset: 'tiny-65' is not one of"),
        (["start", "--preset", "tiny-64", "--data", "prepared", "--name", "a/b"], 2, "run: 'a/b' is not"),
        (["start", "--preset", "tiny-64", "--data", "prepared", "--examples", "-1"], 2, "spec.examples: "),
        (["start", "--preset", "tiny-64", "--data", "prepared", "--seconds", "-1"], 2, "spec.limit: -1 s is not"),
        (["start", "--preset", "tiny-64", "--data", "prepared", "--gpus", "1"], 2, "spec.pod: would change nothing"),
        (["start", "--preset", "tiny-64", "--data", "prepared", "--executor", "moon"], 2, "--executor: invalid choice"),
        (["get", "nobody"], 1, "NOT_FOUND: run: there is no run 'nobody'"),
        (["delete", "nobody"], 1, "NOT_FOUND: run: there is no run 'nobody'"),
        (["cancel", "first"], 1, "FAILED_PRECONDITION: run: 'first' has succeeded"),
        (["export", "first", "--weights", "../w"], 2, "weights: '../w' is not a folder under"),
        (["watch", "second"], 1, "ABORTED: run second cancelled"),
    ],
)
def test_what_cannot_be_is_one_line(
    reimagen: Callable[..., tuple[int, str, str]], arguments: list[str], status: int, named: str
) -> None:
    got, out, err = reimagen("train", *arguments)
    assert got == status and out == ""
    assert err.splitlines()[-1].startswith("reimagen: error: ") and named in err.splitlines()[-1]


def test_runs_are_shown_for_people_and_for_programs(reimagen: Callable[..., tuple[int, str, str]]) -> None:
    assert {row.split("\t")[0] for row in reimagen("train", "list")[1].splitlines()} == {"first", "second"}
    assert [run["name"] for run in json.loads(reimagen("train", "list", "--state", "cancelled", "--json")[1])] == [
        "second"
    ]
    rows = dict(row.split("\t") for row in reimagen("train", "get", "first")[1].splitlines())
    assert (rows["state"], rows["preset"], rows["step"]) == ("succeeded", "tiny-64", "16")
    assert rows["export"] == "succeeded exported/first/unet_64.safetensors"
    status, out, _ = reimagen("train", "watch", "first", "--json")
    assert status == 0 and json.loads(out)["run"]["state"] == "succeeded"
    status, out, _ = reimagen("health")
    assert status == 0 and out.startswith("reimagen.trainer.v1.TrainerService\t")


def test_without_an_address_it_says_which_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "list"], {}) == 2
    assert "--trainer: is missing; give it, or set REIMAGEN_TRAINER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trainer: "), Client() as client:
        _ = client.trainer


def test_whoever_ends_a_watch_is_told_that_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    started = run_of(trainer_pb2.Run(name="first", state=trainer_pb2.RUN_STATE_RUNNING))

    def events() -> Iterator[Run]:
        yield started
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _followed(argparse.Namespace(out=None, json=False), events())
    assert capsys.readouterr().err.splitlines()[-1] == "first goes on; `reimagen train cancel first` ends it"


def test_a_name_that_is_none_of_the_contracts_is_a_field_error(service: TrainerProcess) -> None:
    with Client(trainer=service.address) as client:
        for field, spec in (
            ("spec.executor", RunSpec(preset="p", data="d", executor="moon")),
            ("spec.parallel", RunSpec(preset="p", data="d", parallel="both")),
            ("spec.ranks", RunSpec(preset="p", data="d", ranks=-1)),
            ("spec.limit", RunSpec(preset="p", data="d", limit_s=1e300)),
        ):
            with pytest.raises(FieldError, match=field):
                client.trainer.start(spec)


def line(step: int, time: str, kind: str = "train") -> Figures:
    """A line of a log."""
    return Figures(kind=kind, step=step, examples=8 * step, time=time, values={})


def test_a_cursor_takes_every_line_once() -> None:
    """Times have as many digits as they need; two lines may have the same one."""
    cursor = RunCursor(0)
    first = [
        line(1, "2026-01-01T00:00:58.400Z"),
        line(2, "2026-01-01T00:00:59Z"),
        line(2, "2026-01-01T00:00:59Z", "held_out"),
    ]
    assert [cursor.takes(event) for event in first] == [True] * 3
    assert cursor.from_step == 2
    again = [*first[1:], line(3, "2026-01-01T00:00:59.100Z"), line(1, "2026-01-01T00:01:07Z")]
    assert [cursor.takes(event) for event in again] == [False, False, True, True], "a run that went on says steps again"
    assert cursor.from_step == 1
    grid = SampleGrid(step=1, examples=8, time="2026-01-01T00:00:58.401Z", png=b"")
    assert cursor.takes(grid) and not cursor.takes(grid)


def test_a_terminal_gets_a_bar(commanded: object, service: TrainerProcess) -> None:
    """The same events, on a console of a terminal's kind."""
    with Client(trainer=service.address) as client:
        events = list(client.trainer.watch("first"))
        console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
        bar = TrainBar(console)
        with bar.live():
            for event in events:
                bar.show(event)
        exported = client.trainer.get("first").export
        assert exported is not None
        bar.exported(exported)
    said = console.export_text()
    assert "128/128" in said and "first succeeded" in said and "held out" in said
