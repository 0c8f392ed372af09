"""The trainer's service as a process, as its tests start, ask, kill and start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.retry import RetryPolicy
from client.trainer import Run, RunSpec, TrainerClient

ROOT = Path(__file__).parents[2]
START_S, PATIENCE_S = 60.0, 120.0
POLL_S = 0.05
# Channels to one address share their pauses between connections, which grow while a service is started anew.
PATIENT = RetryPolicy(max_attempts=9)
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait do not spin


class TrainerProcess:
    """One service over a folder; a second one over the same folder is the next service."""

    program: tuple[str, ...] = ("trainer.service",)

    def __init__(self, folder: Path, data: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.runs, self.weights = folder / "runs", folder / "weights"
        self.address = f"unix:{folder}/t.sock"
        self._data = data
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> TrainerClient:
        """Start it, and connect."""
        flags = {"runs": self.runs, "data": self._data, "weights": self.weights, "address": self.address}
        named = [f"--{name}={value}" for name, value in (flags | {"poll-s": POLL_S, "grace-s": 1}).items()]
        with (self.folder / "service.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.program, *named, *self._flags],
                cwd=ROOT,
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        assert said.startswith(b"ready"), (self.folder / "service.log").read_text()
        return TrainerClient(self.address, retry=PATIENT)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; gives its status."""
        assert self._process is not None and self._process.stdout is not None
        self._process.send_signal(number)
        code = self._process.wait(START_S)
        self._process.stdout.close()
        self._process = None
        return code

    def close(self) -> None:
        """End it and what it has started."""
        if self._process is not None:
            self.end(signal.SIGKILL)
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and self._is_ours(folder):
                os.kill(int(folder.name), signal.SIGKILL)

    def _is_ours(self, process: Path) -> bool:
        try:
            return str(self.runs).encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False


@contextmanager
def training(folder: Path, data: Path, *flags: str) -> Iterator[tuple[TrainerProcess, TrainerClient]]:
    """A running service, and a client of it; nothing of it is left afterwards."""
    service = TrainerProcess(folder, data, *flags)
    try:
        with service.start() as client:
            yield service, client
    finally:
        service.close()


def tiny(**changes: Any) -> RunSpec:
    """A run of seconds."""
    return RunSpec(**({"preset": "tiny-64", "data": "shapes", "threads": 1} | changes))


def slow(**changes: Any) -> RunSpec:
    """One that takes a second and more for each step, saves its state after each, and says so."""
    often = {"evaluate_every_steps": 1, "save_every_steps": 1}
    return tiny(**(often | changes))


def until(client: TrainerClient, name: str, is_so: Callable[[Run], object]) -> Run:
    """The run when `is_so`."""
    give_up = time.monotonic() + PATIENCE_S
    while not is_so(run := client.get(name)):
        assert time.monotonic() < give_up, run
        time.sleep(POLL_S)
    return run


def over(client: TrainerClient, name: str) -> Run:
    """The run when it is over."""
    return until(client, name, lambda run: run.is_over)


def has_trained(steps: int) -> Callable[[Run], bool]:
    """Whether a run has said that it took so many steps."""
    return lambda run: run.progress is not None and run.progress.step >= steps


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
