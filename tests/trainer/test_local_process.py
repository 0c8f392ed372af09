"""Commands that outlive whoever started them: found again, told apart, ended. With real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.service.attempt import ENDED, IS_LOCKED, PROCESS
from trainer.service.local_process import Ending, LocalProcess
from trainer.service.processes import MARK, identify, is_alive, marked, send

PATIENCE_S = 30.0
SLEEPING = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
POLITE = [
    sys.executable,
    "-c",
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
    "print('begun', flush=True)\ntime.sleep(60)",
]


def until(process: LocalProcess, wanted: Any) -> Any:
    """What is seen when it is `wanted`, or a text that was said."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        seen = process.look()
        if seen == wanted or (isinstance(wanted, type) and isinstance(seen, wanted)) or str(wanted) in process.tail():
            return seen
        assert time.monotonic() < give_up, (seen, process.tail())
        time.sleep(0.02)


def test_how_it_ended_is_known_to_whoever_comes_later(tmp_path: Path) -> None:
    first = LocalProcess(tmp_path, "a")
    assert first.look() == "absent"
    first.launch([sys.executable, "-c", "print('one\\ntwo'); raise SystemExit(3)"])
    assert first.look() == "running", "although it has not begun"
    ending = until(first, Ending)
    assert (ending.code, ending.asked, str(ending)) == (3, False, "ended with status 3")
    later = LocalProcess(tmp_path, "a")
    assert later.look() == ending and later.tail() == "one\ntwo"
    assert LocalProcess(tmp_path, "b").look() == "absent", "what was before is none of the next one's"


def test_it_is_asked_to_end_once_and_says_so(tmp_path: Path) -> None:
    process = LocalProcess(tmp_path, "a")
    process.launch(POLITE)
    assert process.terminate() is False, "it has not begun: ask again"
    until(process, "begun")
    later = LocalProcess(tmp_path, "a")
    assert later.terminate() is True
    ending = until(later, Ending)
    assert (ending.code, ending.asked) == (0, True) and later.tail() == "begun\nsaved"


def test_two_of_them_in_one_folder_are_one(tmp_path: Path) -> None:
    first, second = LocalProcess(tmp_path, "a"), LocalProcess(tmp_path, "a")
    first.launch(SLEEPING)
    until(first, "begun")
    before = first.process()
    second.launch(SLEEPING)
    assert second._child is not None and second._child.wait(PATIENCE_S) == IS_LOCKED
    assert second.process() == before and second.look() == "running"
    other = LocalProcess(tmp_path, "b")
    other.launch(SLEEPING)
    assert other._child is not None and other._child.wait(PATIENCE_S) == IS_LOCKED
    assert other.look() == "absent", "its turn comes when the folder is free"
    first.kill()
    assert until(first, Ending).code == -signal.SIGKILL


def test_what_it_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """Workers that have put themselves into sessions of their own, as torchrun's do."""
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    worker = f"import subprocess, sys; subprocess.Popen({sleep}, start_new_session=True)"
    process = LocalProcess(tmp_path, "left-behind")
    process.launch([sys.executable, "-c", worker])
    assert until(process, Ending).code == 0
    assert not list(marked("left-behind"))


def test_when_its_keeper_is_killed_it_is_ended_and_that_is_said(tmp_path: Path) -> None:
    process = LocalProcess(tmp_path, "orphan")
    process.launch(SLEEPING)
    until(process, "begun")
    keeper = process.process()
    assert keeper is not None and len(list(marked("orphan"))) == 2
    send(keeper, signal.SIGKILL)
    later = LocalProcess(tmp_path, "orphan")
    ending = until(later, Ending)
    assert ending.code is None and "was killed" in str(ending)
    assert not list(marked("orphan"))
    assert process.look() != "running"


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "another boot"}])
def test_a_process_id_alone_is_nobody(tmp_path: Path, change: dict[str, Any]) -> None:
    """The id was given away again since: whoever has it now is not ours, and gets no signal."""
    stranger = subprocess.Popen(SLEEPING, stdout=subprocess.DEVNULL)
    try:
        itself = identify(stranger.pid)
        assert itself is not None and is_alive(itself)
        another = replace(itself, **change)
        written = {"token": "a", "pid": another.pid, "start_ticks": another.start_ticks, "boot_id": another.boot_id}
        (tmp_path / PROCESS).write_text(json.dumps(written))
        process = LocalProcess(tmp_path, "a")
        assert isinstance(process.look(), Ending)
        process.terminate()
        process.kill()
        assert send(another, signal.SIGKILL) is False
        time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert identify(stranger.pid) is None and not is_alive(itself)


def test_endings_name_the_signal_also_of_a_rank() -> None:
    said = {code: str(Ending(code=code, asked=False, time_s=0.0)) for code in (1, -9, 128 + 9, 128 + 11, 255)}
    assert said[-9] == "was ended by SIGKILL, or memory ran out" and said[1] == "ended with status 1"
    assert said[137] == "ended with status 137 (SIGKILL, or memory ran out)" and said[139].endswith("(SIGSEGV)")
    assert said[255] == "ended with status 255"


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    process = LocalProcess(tmp_path, "a")
    process.launch(["/nowhere/python"])
    assert until(process, Ending).code == 127
    assert process.tail() == "/nowhere/python: No such file or directory"


def test_a_keeper_that_cannot_begin_is_no_silence(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    process = LocalProcess(tmp_path, "a")
    process.launch(SLEEPING)
    assert until(process, Ending).code == 1
    assert "IsADirectoryError" in process.tail()
    assert not (tmp_path / ENDED).exists() and MARK not in os.environ
