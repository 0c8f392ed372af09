"""Processes told apart for good: a process id is given away again, together with start time and boot it is not (Linux)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MARK = "REIMAGEN_ATTEMPT"
"""Variable that a command and all its descendants bear, whatever session they have put themselves into."""

SWEEP_POLL_S = 0.05
_STATE, _START_TICKS = 0, 19  # fields of /proc/PID/stat after the name, see proc(5)
_DEAD = ("Z", "X")


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """One process of one boot: its id, and when it started, in clock ticks since then."""

    pid: int
    start_ticks: int
    boot_id: str


def identify(pid: int) -> ProcessId | None:
    """The process of this id; None where none lives."""
    fields = _stat(pid)
    if fields is None or fields[_STATE] in _DEAD:
        return None
    return ProcessId(pid=pid, start_ticks=int(fields[_START_TICKS]), boot_id=_boot_id())


def is_alive(process: ProcessId) -> bool:
    """Whether it still runs."""
    return identify(process.pid) == process


def send(process: ProcessId, number: signal.Signals) -> bool:
    """Send a signal to this very process; gives whether it still lived."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:  # the descriptor holds the process that has the id now: if it is ours, none else can be hit
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def marked(token: str) -> Iterator[ProcessId]:
    """The processes that bear this mark."""
    wanted = f"{MARK}={token}".encode()
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # ended meanwhile, or somebody else's
                process = identify(int(folder.name))
                if process is not None and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    yield process


def sweep(token: str, *, grace_s: float) -> None:
    """End every process that bears this mark, but ourselves: by SIGTERM, after `grace_s` by SIGKILL."""
    give_up, number = time.monotonic() + grace_s, signal.SIGTERM
    told: set[ProcessId] = set()
    while left := [process for process in marked(token) if process.pid != os.getpid()]:
        if time.monotonic() >= give_up:
            number, told = signal.SIGKILL, set()
        for process in left:
            if process not in told:
                send(process, number)
                told.add(process)
        time.sleep(SWEEP_POLL_S)


def _stat(pid: int) -> list[str] | None:
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()
