"""Runs over real sockets: what they leave, that they go on, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import Client, GenerationFailed
from client.generation_types import Generation, GenerationRequest
from client.picture_record import read_record
from common.files import write_atomic
from common.images import decode_rgb
from evaluation.entitydraw.requests import seeds_of
from evaluation.entitydraw.results import PictureRow, RunError, RunFolder
from evaluation.entitydraw.runner import RunSettings, run_suite
from evaluation.entitydraw.suite_file import Suite
from evaluation.entitydraw.systems import BUILT_IN, System
from tests.evaluation.entitydraw.conftest import ENTITIES, silent

ROOT = Path(__file__).parents[3]
FAST = System(name="fast", steps=1)


class Counting:
    """A client that counts what is asked for, and breaks where it is told to."""

    def __init__(self, client: Client, *, breaks_after: int = 1000, refusals: int = 0) -> None:
        self._client = client
        self._left = breaks_after
        self._refusals = refusals
        self.seeds: list[tuple[str, int]] = []

    def models(self) -> Any:
        return self._client.models()

    def generate(self, request: GenerationRequest, *, timeout_s: float) -> Generation:
        if self._refusals:
            self._refusals -= 1
            raise GenerationFailed("RESOURCE_EXHAUSTED", "full", retry_after_s=0.01)
        if self._left == 0:
            raise GenerationFailed("INTERNAL", "broken")
        self._left -= 1
        self.seeds += [(request.prompt, seed) for seed in request.seeds]
        return self._client.generate(request, timeout_s=timeout_s)


def pictures(folder: RunFolder) -> dict[str, bytes]:
    """Every picture of a run by its name."""
    return {folder.relative(path): path.read_bytes() for path in folder.path.rglob("pictures/*/*/*.png")}


def test_a_run_leaves_what_the_contract_says(drawn: RunFolder, suite: Suite) -> None:
    rows = drawn.rows()
    assert len(rows) == 3 * 6 * 2 == len(pictures(drawn))
    assert [row.key for row in rows] == sorted(row.key for row in rows)
    run = drawn.read_run()
    assert run["suite"]["sha256"] == suite.sha256 and run["command"] == "a command" and run["finished"]
    assert list(run["systems"]) == list(BUILT_IN)
    stages = run["generator"]["stages"]
    assert [(s["stage"], len(s["weights_sha256"])) for s in stages] == [(64, 64)], "of the stages that were run"
    for row in rows:
        content = (drawn.path / row.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row.sha256
        record = json.loads(read_record(content))
        assert record["prompt"] == row.prompt and record["seed"] == row.seed
        assert (row.frequency, row.frequent) == (ENTITIES[row.entity], row.entity != "steam locomotive")
        assert len(row.suite_references) == 3
        for neighbor in row.neighbors:
            assert hashlib.sha256((drawn.path / neighbor.file).read_bytes()).hexdigest() == neighbor.sha256
        for file in row.suite_references:
            assert (drawn.path / file).is_file()
    found = {system: [row for row in rows if row.system == system] for system in BUILT_IN}
    assert not any(row.neighbors for row in found["none"])
    assert all([n.is_reference for n in row.neighbors] == [True, True] for row in found["given"])
    assert all(n.pair_id and n.entity == row.entity for row in found["retrieved"] for n in row.neighbors)
    assert {row.file.rpartition("/")[2] for row in found["none"]} == {
        row.file.rpartition("/")[2] for row in found["given"]
    }


def test_a_run_that_broke_goes_on_and_draws_nothing_twice(suite: Suite, drawing: Client, tmp_path: Path) -> None:
    folder, settings = RunFolder(tmp_path / "run"), RunSettings(pictures=2, calls=2)
    broken = Counting(drawing, breaks_after=3)
    with pytest.raises(GenerationFailed, match=r"system 'fast', prompt '.+': broken"):
        run_suite(suite, [FAST], broken, folder, settings, silent)  # type: ignore[arg-type]
    before = pictures(folder)
    assert len(before) == 6 and folder.read_run()["finished"] is None
    # What a kill leaves: a line that is cut, a row that never came, a file without its name, and half of a prompt.
    rows = folder.rows()
    lost, gone = rows[0], rows[-1]
    text = "".join(folder.rows_file.read_text().splitlines(keepends=True)[1:])
    folder.rows_file.write_text(text[:-40])
    (folder.path / gone.file).unlink()
    (folder.path / gone.file).with_name(".1.png.abc.part").write_bytes(b"\x89PNG")
    counting = Counting(drawing)
    assert run_suite(suite, [FAST], counting, folder, settings, silent) == 7  # type: ignore[arg-type]
    asked = broken.seeds + counting.seeds
    assert sorted(seed for _, seed in asked if seed == gone.seed) == [gone.seed] * 2, "what was lost is drawn again"
    assert len(set(asked)) == 12 and len(asked) == 13, "and nothing else is"
    after = pictures(folder)
    assert len(after) == 12 and all(after[name] == content for name, content in before.items())
    again = {row.key: row for row in folder.rows()}
    assert again[lost.key] == replace(lost, seconds=None), "a row is made again from the picture"
    assert folder.read_run()["finished"]
    nothing = Counting(drawing)
    assert run_suite(suite, [FAST], nothing, folder, settings, silent) == 0 and not nothing.seeds  # type: ignore[arg-type]


def test_a_process_that_is_killed_leaves_a_run_that_goes_on(
    suite: Suite, suite_file: Path, corpus: Path, generator_address: str, drawing: Client, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    flags = {"suite": suite_file, "corpus": corpus, "generator": generator_address, "out": folder.path, "pictures": 4}
    command = [sys.executable, "-m", "evaluation", "entitydraw", "--system", "none", "--calls", "1"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    with running(command) as process:
        give_up = time.monotonic() + 60
        while len(pictures(folder)) < 3:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.002)
        process.kill()
    left = pictures(folder)
    assert 3 <= len(left) < 24
    counting = Counting(drawing)
    run_suite(suite, [BUILT_IN["none"]], counting, folder, RunSettings(pictures=4), silent)  # type: ignore[arg-type]
    assert len(counting.seeds) == 24 - len(left)
    assert len(folder.rows()) == 24 == len(pictures(folder))
    assert {name: pictures(folder)[name] for name in left} == left


class running:
    """A process that is gone when the block ends."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def test_a_generator_that_is_full_is_asked_again(suite: Suite, drawing: Client, tmp_path: Path) -> None:
    patient = Counting(drawing, refusals=3)
    settings = RunSettings(prompts=1, pictures=1)
    assert run_suite(suite, [FAST], patient, RunFolder(tmp_path), settings, silent) == 1  # type: ignore[arg-type]


def test_the_same_run_gives_the_same_pictures(drawn: RunFolder, suite: Suite, drawing: Client, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run_suite(suite, [BUILT_IN["retrieved"]], drawing, folder, RunSettings(prompts=1, pictures=1), silent)
    prompt = suite.part(1)[0]
    name = folder.relative(folder.picture_file("retrieved", prompt.id, seeds_of(suite, prompt, 1)[0]))
    ((drawn_name, again),) = pictures(folder).items()
    before = decode_rgb((drawn.path / name).read_bytes())
    assert drawn_name == name
    # The same bytes in a batch of the same size; beside others convolutions may add up in another order.
    assert np.abs(decode_rgb(again).astype(int) - before.astype(int)).max() <= 1


@pytest.fixture
def copied(drawn: RunFolder, tmp_path: Path) -> RunFolder:
    """A run's `run.json`, and a picture of one system."""
    folder = RunFolder(tmp_path / "copied")
    folder.write_run(drawn.read_run())
    picture = next(drawn.path.glob("pictures/given/*/*.png"))
    write_atomic(folder.path / drawn.relative(picture), picture.read_bytes())
    return folder


def test_another_run_in_the_same_folder_is_refused(copied: RunFolder, suite: Suite, drawing: Client) -> None:
    settings = RunSettings(prompts=1, pictures=1)
    with pytest.raises(RunError, match=r"run.json: suite.sha256: \w+ is not that of tiny.json"):
        run_suite(replace(suite, sha256="0" * 64), [FAST], drawing, copied, settings, silent)
    with pytest.raises(RunError, match=r"systems.given: is \{.*\}, and \{.*'k': 1.*\} is asked for"):
        run_suite(suite, [System(name="given", neighbors="given", k=1)], drawing, copied, settings, silent)
    run = copied.read_run()
    run["generator"]["stages"][0]["weights_sha256"] = "0" * 64
    copied.write_run(run)
    with pytest.raises(RunError, match=r"generator.stages: other weights"):
        run_suite(suite, [FAST], drawing, copied, settings, silent)
    assert len(pictures(copied)) == 1


def test_what_has_drawn_nothing_may_be_put_right(copied: RunFolder, suite: Suite, drawing: Client) -> None:
    """Who mistypes a row, and is told so by the generator, goes on in the same folder."""
    settings = RunSettings(prompts=1, pictures=1)
    for wrong, said in (
        (replace(FAST, name="new", steps=0), r"system 'new', prompt '.*': stages\[0\].steps: 0 is not in"),
        (replace(FAST, name="new", sampler="euler"), r"system 'new': .*sampler: 'euler' is not one of"),
    ):
        with pytest.raises((GenerationFailed, ValueError), match=said):
            run_suite(suite, [wrong], drawing, copied, settings, silent)
    assert run_suite(suite, [replace(FAST, name="new")], drawing, copied, settings, silent) == 1
    assert list(copied.read_run()["systems"]) == ["given", "new"], "systems that drew nothing are gone"


def test_a_folder_that_is_no_run_is_said(tmp_path: Path, drawn: RunFolder) -> None:
    with pytest.raises(RunError, match=r"run.json does not exist"):
        RunFolder(tmp_path).read_run()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="is not of format"):
        RunFolder(tmp_path).read_run()
    (tmp_path / "pictures.jsonl").write_text('{"a": 1}\n{"b"')
    with pytest.raises(RunError, match=r"pictures.jsonl:1 is no row"):
        RunFolder(tmp_path).rows()


@pytest.mark.parametrize("wrong", [{"pictures": 0}, {"pictures": 9}, {"calls": 0}, {"prompts": -1}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}: {value} is "):
        RunSettings(**wrong)


def test_rows_are_read_as_they_were_written(drawn: RunFolder, tmp_path: Path) -> None:
    rows = drawn.rows()
    folder = RunFolder(tmp_path)
    for row in rows:
        target = folder.path / row.file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    folder.write_rows(reversed(rows))
    assert folder.rows() == rows and isinstance(rows[0], PictureRow)
