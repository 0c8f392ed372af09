"""Processes that outlive the command that started them: supervisord keeps them running, until it is told to end.

supervisord is what keeps the files: a log for each process, started again where it ends. It is asked over its Unix socket.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from common.files import write_atomic
from deploy.local.children import ROOT, ChildFailed

SOCKET, CONFIG, LOGS = "supervisor.sock", "supervisord.conf", "logs"
SOCKET_BYTES = 107 - len(".4194304")  # unix(7): sun_path is 108 bytes, the last one zero
START_S = 10.0
STOP_S = 60.0
POLL_S = 0.1
LOG_BYTES = 10 << 20
_RUNNING = ("STARTING", "RUNNING", "BACKOFF")
_GONE = (OSError, Fault)  # what asking nobody gives


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process of the stack.

    Attributes:
        name: of its log, and of its row in the table.
        command: its arguments; nothing in it is read by a shell.
        environment: variables beside our own.
        address: what a caller dials.
        metrics_port: where Prometheus reads it; 0: nowhere.
        stop_s: seconds that it gets to end by itself.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str
    metrics_port: int = 0
    stop_s: int = 20


@dataclass(frozen=True, kw_only=True)
class State:
    """How a program does: supervisord's word for it (RUNNING, BACKOFF, FATAL, ...), and its process id (0: none)."""

    name: str
    state: str
    pid: int


class Supervision:
    """The stack of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._socket = _socket(self.folder)

    @property
    def _rpc(self) -> Any:
        """supervisord's interface; a new one each time, since its transport does not outlive a failure."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        return cast(Any, ServerProxy("http://127.0.0.1", transport)).supervisor

    def log(self, name: str) -> Path:
        """The log of a program."""
        return self.folder / LOGS / f"{name}.log"

    def is_up(self) -> bool:
        """Whether a supervisord answers."""
        with suppress(*_GONE):
            return bool(self._rpc.getState())
        return False

    def start(self, programs: Sequence[Program]) -> None:
        """Start supervisord, and with it the programs.

        Raises:
            ChildFailed: it does not start; the message is what it says.
        """
        if "%" in str(self.folder):  # supervisord reads names in it, once here and twice there
            raise ChildFailed(f"supervisord: {self.folder} has a % in its name")
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / CONFIG, self._config(programs).encode())
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.folder / CONFIG)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
            raise ChildFailed(f"supervisord: {said[0] if said else done.returncode}")

    def states(self) -> list[State]:
        """How each program does; none where no supervisord answers."""
        with suppress(*_GONE):
            return [
                State(name=said["name"], state=said["statename"], pid=said["pid"])
                for said in self._rpc.getAllProcessInfo()
            ]
        return []

    def check(self) -> None:
        """Raises ChildFailed where a program does not run, with the last line of its log."""
        for state in self.states():
            if state.state not in _RUNNING:
                raise ChildFailed(
                    f"{state.name}: {state.state.lower()}; its log ends with {self.last_line(state.name)!r}"
                )

    def last_line(self, name: str) -> str:
        """The last line of a program's log."""
        with suppress(FileNotFoundError):
            lines = [line for line in self.log(name).read_text(errors="replace").splitlines() if line.strip()]
            return lines[-1] if lines else ""
        return ""

    def stop(self) -> bool:
        """End everything, each program in its own time; gives whether there was anything to end.

        Raises:
            ChildFailed: it still runs after STOP_S.
        """
        with suppress(*_GONE):
            pid = int(self._rpc.getPID())
            self._rpc.shutdown()
            give_up = time.monotonic() + STOP_S
            while Path(f"/proc/{pid}").exists() and time.monotonic() < give_up:
                if _is_zombie(pid):
                    break
                time.sleep(POLL_S)
            else:
                if Path(f"/proc/{pid}").exists():
                    raise ChildFailed(f"supervisord: process {pid} still runs after {STOP_S:g} s")
            return True
        return False

    def _config(self, programs: Sequence[Program]) -> str:
        folder = self.folder
        lines = [
            "[unix_http_server]",
            f"file={self._socket}",
            "chmod=0700",
            "[supervisord]",
            f"logfile={folder}/{LOGS}/supervisord.log",
            f"pidfile={folder}/supervisord.pid",
            f"childlogdir={folder}/{LOGS}",
            f"directory={_escaped(str(ROOT))}",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        ]
        for program in programs:
            lines += [
                f"[program:{program.name}]",
                f"command={_escaped(shlex.join(_words(program)))}",
                f"stdout_logfile={folder}/{LOGS}/{program.name}.log",
                f"stdout_logfile_maxbytes={LOG_BYTES}",
                "stdout_logfile_backups=1",
                "redirect_stderr=true",
                "autorestart=true",
                "startsecs=1",
                "startretries=3",
                f"stopwaitsecs={program.stop_s}",
                "killasgroup=true",  # a server's own children go with it
            ]
        return "\n".join(lines) + "\n"


def _socket(folder: Path) -> Path:
    """supervisord's socket: in the folder, or among temporary files where its path is too long for a socket's address.

    supervisord binds the name with its process id behind it, hence the margin.
    """
    there = folder / SOCKET
    if len(os.fsencode(there)) <= SOCKET_BYTES:
        return there
    return Path(tempfile.gettempdir()) / f"reimagen-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"


def _escaped(text: str) -> str:
    """A value of supervisord's configuration, which reads %(NAME)s."""
    return text.replace("%", "%%")


def _words(program: Program) -> list[str]:
    """The command behind `env`: supervisord's own setting of variables has no way to write a quotation mark."""
    return ["env", *(f"{name}={value}" for name, value in program.environment.items()), *program.command]


def _is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
