"""Processes that stay: logs, restarts, and an end that leaves nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.children import ChildFailed
from deploy.local.supervision import Program, State, Supervision

WAIT_S = 20.0


def until(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < give_up, "did not come about"
        time.sleep(0.05)


def program(name: str, code: str, **environment: str) -> Program:
    return Program(name=name, command=[sys.executable, "-c", code], environment=environment, address="127.0.0.1:1")


@pytest.fixture
def supervision(tmp_path: Path) -> Iterator[Supervision]:
    made = Supervision(tmp_path / 'a "strange" folder')
    yield made
    made.stop()


def state(supervision: Supervision, name: str) -> State:
    return next(state for state in supervision.states() if state.name == name)


SLEEPS = "import os, sys, time; print('began', os.environ['WORD'], sys.argv, flush=True); time.sleep(60)"


def test_a_program_runs_with_its_environment_and_log_and_is_started_again(supervision: Supervision) -> None:
    assert not supervision.is_up() and supervision.states() == []
    supervision.start([program("one", SLEEPS, WORD='50% of "it"')])
    until(lambda: "began" in supervision.last_line("one"))
    assert '50% of "it"' in supervision.last_line("one")
    until(lambda: state(supervision, "one").state == "RUNNING")
    first = state(supervision, "one").pid
    os.kill(first, signal.SIGKILL)
    until(lambda: state(supervision, "one").state == "RUNNING" and state(supervision, "one").pid != first)
    supervision.check()


def test_a_folder_too_long_for_the_address_of_a_socket(tmp_path: Path) -> None:
    supervision = Supervision(tmp_path / ("long" * 30))
    supervision.start([program("one", SLEEPS, WORD="x")])
    assert supervision.is_up()
    assert not Supervision(tmp_path / ("long" * 31)).is_up(), "another folder has another one"
    assert supervision.stop() and not supervision.is_up()


def test_the_end_leaves_no_process(supervision: Supervision) -> None:
    supervision.start([program("one", SLEEPS, WORD="x"), program("two", SLEEPS, WORD="y")])
    until(lambda: all(state.state == "RUNNING" for state in supervision.states()))
    pids = [state.pid for state in supervision.states()]
    assert len(pids) == 2
    assert supervision.stop() and not supervision.is_up()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not supervision.stop(), "nothing is left to end"


def test_a_program_that_cannot_run_is_named_with_its_last_line(supervision: Supervision) -> None:
    supervision.start([program("broken", "raise SystemExit('no weights')")])

    def has_failed() -> bool:
        return state(supervision, "broken").state == "FATAL"

    until(lambda: state(supervision, "broken").state in ("BACKOFF", "FATAL"))
    give_up = time.monotonic() + WAIT_S
    while not has_failed() and time.monotonic() < give_up:
        time.sleep(0.1)
    with pytest.raises(ChildFailed, match="broken: fatal; its log ends with 'no weights'"):
        supervision.check()


def test_a_folder_that_supervisord_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="100% has a %"):
        Supervision(tmp_path / "100%").start([])
