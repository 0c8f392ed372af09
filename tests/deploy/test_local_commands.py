"""`python -m deploy.local`, as processes: what it leaves, what it says, and that it takes its children along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.images import decode_rgb
from deploy.local.__main__ import main
from deploy.local.children import ROOT
from deploy.local.knowledge_base import LIBRARY, NAME
from retrieval_svc.iconify import SETS

PROMPT = "a guide dog, noto style, on a blue background"
TIMEOUT_S = 120.0
FEW_STEPS = ["--steps-64=2", "--steps-256=2", "--steps-1024=2"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts commands, each in a session of its own."""
    started: list[subprocess.Popen[str]] = []
    scratch = {"TMPDIR": str(tmp_path_factory.mktemp("t"))}  # a command that is killed leaves its sockets there

    def start_one(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "deploy.local", *map(str, arguments)]
        environment = os.environ | scratch | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def begin(start: Start, weights: Path, work: Path) -> Start:
    """Starts `generate` with the tiny weights, unless other flags are given."""

    def begin_one(out: Path, *flags: object, prompt: str = PROMPT) -> subprocess.Popen[str]:
        usual = ["--prompt", prompt, "--out", out, "--work", work, "--seed", 7, "--weights", weights]
        return start("generate", *usual, *flags)

    return begin_one


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of a command that ends by itself."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def session(leader: int) -> list[int]:
    """Processes of a session that live (those that have ended and wait for their parent do not count)."""
    living = []
    for folder in Path("/proc").iterdir():
        try:
            state, _, _, sid = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if folder.name.isdigit() and int(sid) == leader and state != "Z":
            living.append(int(folder.name))
    return living


def wait_until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until `condition` holds."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_generate_leaves_its_files_and_the_same_ones_again(begin: Start, tmp_path: Path) -> None:
    runs = [begin(tmp_path / name, *FEW_STEPS) for name in ("first", "second")]
    (status, out, err), again = (end(run) for run in runs)
    assert status == again[0] == 0, err
    names = ["image-7.png", "stage-64.png", "stage-256.png", "neighbors.png", "record.json"]
    assert out.splitlines() == [str(tmp_path / "first" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(names)
    for name in names[:-1]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert decode_rgb((tmp_path / "first" / "image-7.png").read_bytes()).shape == (1024, 1024, 3)
    record = json.loads((tmp_path / "first" / "record.json").read_text())
    assert record["seed"] == 7 and record["prompt"] == PROMPT
    assert [neighbor["license"] for neighbor in record["neighbors"]] == ["CC-BY-4.0"] * 2
    assert {
        "start",
        "retrieve",
        "encode",
        "stage_64",
        "stage_256",
        "stage_1024",
        "encode_pictures",
        "total",
        "command",
    } == set(record["timings_s"])
    for said in ("guide dog  noto  author of noto  CC-BY-4.0", "stage 64: 2/2", "stage 256: 2/2", "stage 1024: 2/2"):
        assert said in err


def test_what_goes_wrong_is_told_in_one_line_and_leaves_nothing(
    begin: Start, weights: Path, tmp_path: Path, small_disk: Path | None
) -> None:
    damaged = tmp_path / "weights"
    shutil.copytree(weights, damaged)
    file = damaged / "unet_256.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    unknown_style = begin(tmp_path / "out", prompt="a guide dog, vaporwave style")
    corrupted = begin(tmp_path / "out", "--weights", damaged)
    full_disk = begin((small_disk or Path("/nowhere")) / "out", "--stop-at=64", "--steps-64=2")
    for process, named in (
        *([(full_disk, f"error: No space left on device: {small_disk}/out/")] if small_disk else ()),
        (unknown_style, f"error: prompt: names style 'vaporwave', which is not one of {', '.join(SETS)}"),
        (corrupted, f"error: generator: weights: {file} is corrupted"),
    ):
        status, out, err = end(process)
        assert (status, out) == (4 if process is full_disk else 2, "")
        assert len([line for line in err.splitlines() if "error:" in line]) == 1
        assert named in err.splitlines()[-1]
        assert not session(process.pid)
    assert not (tmp_path / "out").exists()
    assert small_disk is None or list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_child_outlives_a_command_that_is_ended_while_its_children_start(
    begin: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = begin(tmp_path / "out")
    wait_until(lambda: len(session(process.pid)) == 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    wait_until(lambda: not session(process.pid), timeout_s=5)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_no_child_outlives_a_command_that_is_interrupted_or_fails_while_it_draws(begin: Start, tmp_path: Path) -> None:
    interrupted, crashing = (begin(tmp_path / "out", "--steps-64=1000") for _ in range(2))
    for process in (interrupted, crashing):
        assert process.stderr is not None
        assert any("stage 64: 100/1000" in line for line in process.stderr)
    os.killpg(interrupted.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    status, _, err = end(interrupted)
    assert (status, err.splitlines()[-1]) == (128 + signal.SIGINT, "deploy.local: error: interrupted")
    assert not session(interrupted.pid)
    (generator,) = (
        pid for pid in session(crashing.pid) if b"generator_svc" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(generator, signal.SIGKILL)
    status, _, err = end(crashing)
    assert (status, err.splitlines()[-1]) == (2, "deploy.local: error: generator: was ended by signal 9")
    assert not session(crashing.pid)
    assert not (tmp_path / "out").exists()


def test_a_command_runs_beside_retrieval(start: Start, work: Path, tmp_path: Path) -> None:
    script = (
        "import sys, grpc; from grpc_health.v1 import health_pb2 as h, health_pb2_grpc as g;"
        "print(g.HealthStub(grpc.insecure_channel(sys.argv[1])).Check(h.HealthCheckRequest()).status); sys.exit(5)"
    )
    process = start("with-retrieval", "--work", work, "--", sys.executable, "-c", script, "{address}")
    status, out, err = end(process)
    assert (status, out) == (5, "1\n"), err
    assert not session(process.pid)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prompt", " "], "--prompt: is empty"),
        (["--prompt", "x" * 10_000], "--prompt: 10000 characters"),
        (["--seed", "-1"], "--seed: -1 is not between 0 and"),
        (["--seed", str(2**63)], f"--seed: {2**63} is not between 0 and"),
        (["--k", "0"], "--k: 0 is less than 1"),
        (["--steps-64", "0"], "--steps-64: 0 is not in"),
        (["--text-weight-64", "nan"], "--text-weight-64: nan is not in"),
        (["--out", "/dev/null"], "Not a directory: /dev/null"),
    ],
)
def test_what_needs_no_service_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], named: str
) -> None:
    usual = ["--prompt", PROMPT, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert main(["generate", *usual, *flags]) == 2
    said = capsys.readouterr()
    assert named in said.err and len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_knowledge_base_that_is_there_is_kept(capsys: pytest.CaptureFixture[str], work: Path) -> None:
    kept = (work / "corpus", work / LIBRARY / NAME / "knowledge-base.json", work / LIBRARY / NAME / "pairs")
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["knowledge-base", "--work", str(work)]) == 0
    assert capsys.readouterr().out == f"{work / LIBRARY}\n"
    assert before == {path: path.stat().st_mtime_ns for path in kept}
