"""Training that holds: killed, stopped, hung or out of space, a run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.service.command import FULL_DISK
from trainer.__main__ import main
from trainer.endings import HUNG
from trainer.look import read_log
from trainer.state_file import read_tensors

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 12, 8
TORCHRUN = ("-m", "trainer.torchrun", "--standalone", "--nproc-per-node=2", "-m", "--", "trainer")
END = ("--examples", str(STEPS * BATCH))


def command(data: Path, run: Path, *more: str) -> list[str]:
    """A run at 32 pixels that logs each step, saves every third, and looks only at its end."""
    given = ["fit", "--preset", "tiny-64", "--data", str(data), "--run", str(run), "--threads", "1", "--side", "32"]
    given += ["--log-every", "0", "--evaluate-every", "1e9", "--save-every", "1e9", "--save-every-steps", "3"]
    return [*given, *more]


def started(arguments: list[str], program: tuple[str, ...] = ("-m", "trainer")) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'build/stubs'}"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def until(true: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 120.0) -> None:
    """Wait, while the process lives."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step; what was done again after a kill counts as it was done last."""
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in read_log(run) if line["kind"] == "train"}


def last_state(run: Path) -> tuple[str, str]:
    """Name and content of the newest state."""
    path = sorted(run.glob("state-*.safetensors"))[-1]
    return path.name, read_tensors(path)[1]["sha256"]


@pytest.fixture(scope="module", autouse=True)
def nobody_looks() -> Iterator[None]:
    """Runs in this process draw no samples at their end: `test_fit.py` shows that looking changes nothing."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainer.fit_command.look", lambda trainer: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    assert main(command(prepared_folder, run, *END)) == 0
    assert list(curve(run)) == list(range(1, STEPS + 1))
    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_killed_at_a_random_step_it_goes_on_to_the_bit(
    uninterrupted: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """kill -9; the states, log and curve of the run that went on are those of the run that nothing happened to."""
    step = random.SystemRandom().randrange(4, STEPS - 5)
    process = started(command(prepared_folder, tmp_path))
    until(lambda: len(curve(tmp_path)) >= step, process)
    process.kill()
    process.communicate()
    reached = max(curve(tmp_path))
    assert main(command(prepared_folder, tmp_path, *END)) == 0
    described = json.loads((tmp_path / "run.json").read_text())
    begun = described["starts"][1]["from_step"]
    assert begun % 3 == 0 and reached - 3 <= begun <= reached, "the newest state was taken"
    if reached <= STEPS:
        assert curve(tmp_path) == curve(uninterrupted)
        assert last_state(tmp_path) == last_state(uninterrupted)


def test_terminated_it_saves_and_goes_on_to_the_bit_and_its_description_makes_it_again(
    uninterrupted: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """SIGTERM; and while it runs, Prometheus is answered."""
    port, run = free_port(), tmp_path / "run"
    process = started(command(prepared_folder, run, "--metrics-address", f"127.0.0.1:{port}"))
    until(lambda: len(curve(run)) >= 5, process)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        told = answer.read().decode()
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, f"not what a run that is done says: {said}"
    steps = re.search(r'^reimagen_trainer_steps_total\{preset="tiny-64"\} (\d+)', told, re.MULTILINE)
    assert steps and 5 <= int(steps[1]) <= max(curve(run))
    assert f'reimagen_trainer_samples_total{{preset="tiny-64"}} {int(steps[1]) * BATCH}.0' in told
    assert "reimagen_build_info{" in told and 'service="trainer"' in told
    assert last_state(run)[0] == f"state-{max(curve(run)):08d}.safetensors", "saved where it was"
    assert main(command(prepared_folder, run, *END)) == 0
    if json.loads((run / "run.json").read_text())["starts"][1]["from_step"] < STEPS:
        assert curve(run) == curve(uninterrupted)
        assert last_state(run) == last_state(uninterrupted)
    described = json.loads((run / "run.json").read_text())
    assert described["preset"]["curriculum"] == [[0, 32]] and len(described["versions"]["code_sha256"]) == 64
    again = described["starts"][0]["command"]
    again[again.index("--run") + 1] = str(tmp_path / "again")
    assert main([*again[: again.index("--metrics-address")], *END]) == 0
    assert last_state(tmp_path / "again") == last_state(uninterrupted)


def rank_of(pid: int) -> str:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((e[5:].decode() for e in environment if e.startswith(b"RANK=")), "")


def ranks_under(launcher: int) -> dict[str, int]:
    """Process of each rank that a torchrun has started."""
    children = [int(p) for p in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    return {rank_of(pid): pid for pid in children if rank_of(pid)}


def test_a_rank_that_hangs_is_named_and_ends_the_others(
    uninterrupted: Path, prepared_folder: Path, tmp_path: Path
) -> None:
    """Rank 1 is stopped; what was saved is gone on from by one rank."""
    arguments = command(prepared_folder, tmp_path, "--parallel", "ddp", "--hang-timeout", "8")
    process = started(arguments, TORCHRUN)
    until(lambda: len(curve(tmp_path)) >= 4, process)
    stopped = ranks_under(process.pid)["1"]
    os.kill(stopped, signal.SIGSTOP)
    said = ""
    assert process.stderr is not None
    while "has not finished" not in said and process.poll() is None:
        said += process.stderr.readline()
    os.kill(stopped, signal.SIGKILL)  # torchrun waits for it to take its SIGTERM
    said += process.communicate(timeout=60)[1]
    assert process.returncode == HUNG
    assert re.search(r"rank 1 has not finished step \d+ .*for \d+ s", said), said[-3000:]
    assert main(command(prepared_folder, tmp_path, *END)) == 0
    mine, theirs = curve(tmp_path), curve(uninterrupted)
    for step in range(1, STEPS + 1):
        assert mine[step] == pytest.approx(theirs[step], rel=1e-3)


def test_ranks_that_are_told_to_stop_agree_on_where(uninterrupted: Path, prepared_folder: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun; two ranks began, one goes on."""
    process = started(command(prepared_folder, tmp_path, "--parallel", "ddp"), TORCHRUN)
    until(lambda: len(curve(tmp_path)) >= 4, process)
    process.terminate()
    process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    name, _ = last_state(tmp_path)
    assert name == f"state-{max(curve(tmp_path)):08d}.safetensors"
    assert main(command(prepared_folder, tmp_path, *END)) == 0
    for step, seen in curve(uninterrupted).items():
        assert curve(tmp_path)[step] == pytest.approx(seen, rel=1e-3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which two states fit, and no third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=11000k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_it_in_one_line_with_the_last_state_whole(
    small_disk: Path, uninterrupted: Path, prepared_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    assert main(command(prepared_folder, run, *END)) == FULL_DISK
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "No space left on device" in errors[0] and str(run) in errors[0], errors
    name, digest = last_state(run)
    assert name == "state-00000006.safetensors" and digest
    assert not list(run.glob(".*.part")), "nothing half-written is left"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main(command(prepared_folder, run, *END)) == 0
    assert last_state(run) == last_state(uninterrupted)
