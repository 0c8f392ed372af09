"""A command that outlives us: started in a folder, found again there, asked to end, and how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.service.attempt import ENDED, IS_LOCKED, PROCESS
from trainer.service.bounded_log import MAX_BYTES, last_bytes
from trainer.service.processes import MARK, ProcessId, is_alive, marked, send, sweep

LAUNCH_LOG = "launch.log"
TAIL_LINES, TAIL_BYTES = 20, 4096
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a terminal would obey what it is shown
_SIGNALS = set(signal.Signals)
_QUIET = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}  # bars are no lines; what is said is read at once


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command ended.

    Attributes:
        code: its status, negative for a signal; None: nobody wrote it down.
        asked: whether it was asked to end.
        time_s: when, since the epoch.
    """

    code: int | None
    asked: bool
    time_s: float

    def __str__(self) -> str:
        if self.code is None:
            return "was killed, with whoever waited for it"
        if self.code >= 0:
            by_rank = self.code - 128  # torchrun says so of a rank that a signal has ended
            return f"ended with status {self.code}" + (f" ({_signal(by_rank)})" if by_rank in _SIGNALS else "")
        return f"was ended by {_signal(-self.code)}"


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in _SIGNALS else str(number)
    return name + (", or memory ran out" if number == signal.SIGKILL else "")


class LocalProcess:
    """One command in one folder, known by a mark; whoever makes another of these finds the same command."""

    def __init__(self, folder: Path, token: str, *, log_bytes: int = MAX_BYTES) -> None:
        """`log_bytes`: kept of what it says."""
        self.folder = folder
        self._log_bytes = log_bytes
        self._token = token
        self._child: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[str]) -> None:
        """Start it, in a session of its own; where it runs already nothing is started.

        Raises:
            OSError: the folder cannot be written, or there are no processes to be had.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))
        with (self.folder / LAUNCH_LOG).open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "trainer.service.attempt", str(self.folder), str(self._log_bytes), *command],
                env=os.environ | _QUIET | {"PYTHONPATH": path, MARK: self._token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def look(self) -> Literal["absent", "running"] | Ending:
        """How it does. `absent`: it has not begun, here or elsewhere."""
        code = self._child.poll() if self._child is not None else None  # which also buries it
        process = self.process()
        if process is None:
            if self._child is None or code == IS_LOCKED:
                return "absent"
            return "running" if code is None else Ending(code=code, asked=False, time_s=time.time())
        if is_alive(process):
            return "running"
        ended = self._read(ENDED)
        if ended is not None:
            return Ending(code=ended["code"], asked=ended["asked"], time_s=ended["time_s"])
        sweep(self._token, grace_s=0.0)  # whoever waited for the command is gone: nobody would tell of its end
        return Ending(code=None, asked=False, time_s=time.time())

    def process(self) -> ProcessId | None:
        """Who waits for the command, and hands signals on to it; None: it has not begun."""
        written = self._read(PROCESS)
        if written is None:
            return None
        return ProcessId(pid=written["pid"], start_ticks=written["start_ticks"], boot_id=written["boot_id"])

    def terminate(self) -> bool:
        """Ask it to end; asking again changes nothing. Gives whether it could be asked: not before it has begun."""
        process = self.process()
        return process is not None and send(process, signal.SIGTERM)

    def kill(self) -> None:
        """End all that belongs to it; whoever waits for it writes that down."""
        waiting = self.process()
        for process in marked(self._token):
            if process != waiting:
                send(process, signal.SIGKILL)

    def tail(self) -> str:
        """The last lines that it said."""
        launched = b""
        with suppress(OSError):
            launched = (self.folder / LAUNCH_LOG).read_bytes()[-TAIL_BYTES:]
        has_begun = self.process() is not None  # else what is there was said by the command before
        for found in (last_bytes(self.folder, TAIL_BYTES) if has_begun else b"", launched):
            lines = found.decode(errors="replace").split("\n")
            said = [line.rpartition("\r")[2] for line in lines if line.strip()]
            if said:
                return _CONTROL.sub("?", "\n".join(said[-TAIL_LINES:]))
        return ""

    def _read(self, name: str) -> dict[str, Any] | None:
        """A file of this command; None: there is none, or it is another's."""
        try:
            written = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return written if written.get("token") == self._token else None
