"""What runs say and draw takes a bounded place on disk, and the last lines, which say why, are there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trainer.look import MAX_GRIDS, thin_out
from trainer.service.attempt import PROCESS
from trainer.service.bounded_log import BEFORE, BEGINNING, NEWEST, BoundedLog, last_bytes
from trainer.service.local_process import TAIL_LINES, Ending, LocalProcess

LINES = [f"line {i:06d}\n".encode() for i in range(40_000)]
MANY = "import sys\nfor i in range(40000): print(f'line {i:06d}')\nprint('why', file=sys.stderr)\nraise SystemExit(2)"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("output*"))


@pytest.mark.parametrize("at_once", [1, 7, 5000])
def test_the_beginning_and_the_end_are_kept_whole(tmp_path: Path, at_once: int) -> None:
    """Wherever it is cut, and whatever is asked of its end."""
    log, said = BoundedLog(tmp_path, 3000), b""
    for start in range(0, 20_000, at_once):
        chunk = b"".join(LINES[start : start + at_once])
        log.write(chunk)
        said += chunk
        assert size(tmp_path) <= 3000
    parts = [(tmp_path / name).read_bytes() for name in (BEGINNING, BEFORE, NEWEST)]
    assert parts[0] == said[:1000] and said.endswith(parts[1] + parts[2]) and len(parts[1]) == 1000
    for count in (1, 100, 1000, 1500, 10**6):
        assert last_bytes(tmp_path, count) == (parts[1] + parts[2])[-count:]


def test_what_is_short_is_kept_whole(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path, 3000)
    assert last_bytes(tmp_path, 100) == b""
    said = b"".join(LINES[:150])  # more than one part, less than two
    log.write(said)
    assert last_bytes(tmp_path, 10**6) == said and not (tmp_path / BEFORE).exists()
    BoundedLog(tmp_path, 3000).write(b"the next attempt\n")
    assert last_bytes(tmp_path, 10**6) == b"the next attempt\n" and size(tmp_path) == 17


def test_a_full_disk_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = BoundedLog(tmp_path, 300)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        for line in LINES[:20]:
            log.write(line)
    log.write(b"why\n")
    assert last_bytes(tmp_path, 4) == b"why\n" and size(tmp_path) <= 300


def test_of_a_command_that_says_much_the_last_lines_are_told(tmp_path: Path) -> None:
    process = LocalProcess(tmp_path, "a", log_bytes=96 << 10)
    process.launch([sys.executable, "-c", MANY])
    give_up = time.monotonic() + 30.0
    while not isinstance(seen := process.look(), Ending):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert seen.code == 2
    said = process.tail().splitlines()
    assert said == [line.decode().strip() for line in LINES[1 - TAIL_LINES :]] + ["why"]
    assert size(tmp_path) <= 96 << 10 < sum(map(len, LINES)), "and all that it said was taken from it"
    assert (tmp_path / BEGINNING).read_bytes().startswith(b"line 000000\n")


def test_what_is_left_behind_with_the_pipe_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """One that has put off our mark is not found, and holds the pipe open."""
    left = "import subprocess; print(subprocess.Popen(['sleep', '20'], env={}).pid, flush=True)"
    process = LocalProcess(tmp_path, "a")
    process.launch([sys.executable, "-c", left])
    began = time.monotonic()
    while not isinstance(process.look(), Ending):
        assert time.monotonic() < began + 15.0
        time.sleep(0.02)
    subprocess.run(["kill", process.tail().split()[0]], check=True)


def test_a_terminal_obeys_nothing_that_a_run_says(tmp_path: Path) -> None:
    BoundedLog(tmp_path, 3000).write("a\x1b[2Jb\x07 \u00e9\tc\n".encode())
    (tmp_path / PROCESS).write_text('{"token": "a", "pid": 1, "start_ticks": 0, "boot_id": ""}')
    assert LocalProcess(tmp_path, "a").tail() == "a?[2Jb? \u00e9\tc"
    assert LocalProcess(tmp_path, "b").tail() == "", "which has not begun to say anything"


def test_sample_grids_thin_out(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"samples-{i:09d}.png").touch()
        thin_out(tmp_path)
        kept = sorted(int(path.stem[8:]) for path in tmp_path.glob("samples-*.png"))
        assert len(kept) <= MAX_GRIDS and kept[0] == 0 and kept[-1] == i
    assert max(b - a for a, b in pairwise(kept)) <= 2 * 1000 / MAX_GRIDS, "from all over the run"
