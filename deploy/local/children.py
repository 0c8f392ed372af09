"""The services as child processes: none of them outlives the command, however it ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from common.service.server import die_with_parent

ROOT = Path(__file__).parents[2]
READY = "ready "  # what a service prints when it serves, before its address
NO_BARS = {"TQDM_DISABLE": "1"}  # a library's progress bar is no last line of a log
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 0.3  # a service keeps nothing that would be lost; what is left then is its interpreter's tidying up


class ChildFailed(Exception):
    """A service could not start, or ended; the message holds the last line that it wrote on standard error."""


class Child:
    """`python -m MODULE ...`, with standard error kept in a log."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        """Start it. The kernel ends it with us, from its first moment on: our main thread must be what starts it."""
        self.name = name
        self._log = log
        with log.open("wb") as stream, _signals_held():
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **NO_BARS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stream,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def wait_ready(self, give_up: float) -> None:
        """Wait until it says that it serves.

        Args:
            give_up: moment of `time.monotonic` after which not to wait.

        Raises:
            ChildFailed: it ended, or is not ready by then.
        """
        assert self._process.stdout is not None
        descriptor, said = self._process.stdout.fileno(), b""
        while not said.endswith(b"\n"):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, give_up - time.monotonic()))
            if not readable:
                raise ChildFailed(f"{self.name}: not ready in time; its log ends with {self._last_line()!r}")
            chunk = os.read(descriptor, 4096)
            if not chunk:
                self._process.wait()
                raise ChildFailed(f"{self.name}: {self._last_line() or self._ending()}")
            said += chunk
        assert said.decode().startswith(READY), f"{self.name} said {said!r}"

    def check(self) -> None:
        """Raises ChildFailed where it has ended, or is ending."""
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return
        last = self._last_line()
        raise ChildFailed(f"{self.name}: {self._ending()}" + (f"; its log ends with {last!r}" if last else ""))

    def explain(self) -> str:
        """The last line of its log: the cause of an internal error."""
        return self._last_line()

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait until it has ended, and end it by force where that takes long."""
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ending(self) -> str:
        code = self._process.returncode
        return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"

    def _last_line(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].partition(": error: ")[2] or lines[-1] if lines else ""


@contextmanager
def _signals_held() -> Iterator[None]:
    """What SIGINT and SIGTERM do is done after the block: an exception of theirs is lost in Python's own fork hooks."""
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


@contextmanager
def running(children: Sequence[Child]) -> Iterator[None]:
    """Wait until all of them serve; end them after the block, and however the waiting ends."""
    try:
        give_up = time.monotonic() + START_TIMEOUT_S
        for child in children:
            child.wait_ready(give_up)
        yield
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
