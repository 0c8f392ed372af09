"""The whole stack of `make up` over tiny weights, as a soak sees it: its processes, their metrics, how to kill them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from deploy.local.children import ROOT
from deploy.local.supervision import Supervision
from deploy.local.tritonserver import SHM

HOST = "127.0.0.1"
COMMAND_S = 400.0
SCRAPE_S = 20.0
_OFFSETS = {"retrieval": 0, "generator": 2, "triton": 4}  # of the ports; metrics are one further
_REGIONS = re.compile(rb"shm-region-prefix-name=([\w-]+)")


@dataclass(frozen=True)
class Process:
    """One process of the stack; a name is kept over restarts, a process id is not."""

    name: str
    pid: int


@dataclass
class SoakStack:
    """A stack that is up.

    Attributes:
        regions: prefixes of the shared memory of every tritonserver that was seen.
    """

    state: Path
    first_port: int
    regions: set[str] = field(default_factory=set)

    def address(self, name: str) -> str:
        """What a caller dials."""
        return f"{HOST}:{self.first_port + _OFFSETS[name]}"

    def pid(self, name: str) -> int:
        """Of a program that is supervised; 0 while it does not run."""
        return next((state.pid for state in Supervision(self.state).states() if state.name == name), 0)

    def tritonserver(self) -> int:
        """Process id of the server, whose parent is what is supervised; 0 while there is none."""
        return next((pid for pid in children(self.pid("triton")) if b"bin/tritonserver" in command_line(pid)), 0)

    def stub(self, model: str) -> int:
        """Process id of a model's interpreter; 0 while there is none."""
        named = f"/{model}/".encode()
        return next((pid for pid in children(self.tritonserver()) if named in command_line(pid)), 0)

    def processes(self) -> list[Process]:
        """All processes of the services that are there now."""
        found = [Process(name, pid) for name in _OFFSETS if (pid := self.pid(name))]
        if server := self.tritonserver():
            found.append(Process("tritonserver", server))
            self.regions.update(prefix.decode() for prefix in _REGIONS.findall(command_line(server)))
            for pid in children(server):
                if words := re.search(rb"/models/(\w+)/", command_line(pid)):
                    found.append(Process(words[1].decode(), pid))
        return found

    def figures(self, program: str, name: str) -> dict[str, float]:
        """A metric's samples, by their labels."""
        port = self.first_port + _OFFSETS[program] + 1
        with urlopen(f"http://{HOST}:{port}/metrics", timeout=SCRAPE_S) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {" ".join(f"{k}={v}" for k, v in sorted(s.labels.items())): s.value for s in samples}

    def leftovers(self) -> list[str]:
        """Shared memory of servers that are gone."""
        server = self.tritonserver()
        alive = {prefix.decode() for prefix in _REGIONS.findall(command_line(server))} if server else set()
        gone = self.regions - alive
        return sorted(path.name for path in SHM.iterdir() if path.name.startswith(tuple(gone))) if gone else []

    def strays(self) -> list[str]:
        """Processes that belong to this stack, whoever their parent is."""
        marks = (str(self.state).encode(), f"{HOST}:{self.first_port + 2}".encode())
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        lines = {pid: command_line(pid) for pid in pids if pid != os.getpid()}
        return sorted(f"{pid}: {line[:120]!r}" for pid, line in lines.items() if any(mark in line for mark in marks))


@contextmanager
def running_stack(weights: Path, work: Path, state: Path, first_port: int) -> Iterator[SoakStack]:
    """A stack of its own, for as long as the block lasts."""
    flags = ["--weights", weights, "--work", work, "--first-port", first_port, "--clip", ""]
    started = _command("up", "--state", state, *flags)
    try:
        assert started.returncode == 0, started.stderr
        yield SoakStack(state, first_port)
    finally:
        _command("down", "--state", state)


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children") if pid else ():
        with suppress(OSError):
            found += [int(child) for child in listed.read_text().split()]
    return found


def command_line(pid: int) -> bytes:
    """What a process was started with; empty for one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def resident_mib(pid: int) -> float:
    """Memory of a process, without what it maps of files and shared memory; 0 for one that has ended."""
    with suppress(OSError):
        said = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
        return int(said[1]) / 1024 if said else 0.0
    return 0.0


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; gives whether there was a process."""
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
            return True
    return False


def wait_until(condition, timeout_s: float, what: str) -> float:
    """Seconds until something comes true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)
    return time.monotonic() - started


def _command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.local", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
