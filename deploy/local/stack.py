"""The services of the product on one machine, on Unix sockets in a folder that lives as long as they do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.children import Child, running
from deploy.local.working_copy import working_copy

GRACE_S = "1"  # whoever ends the stack waits for no call


@dataclass(frozen=True, kw_only=True)
class GeneratorFlags:
    """What the generator is told.

    Attributes:
        weights: folder of the stages' weights.
        device: cpu, cuda or cuda:N.
        threads: CPU threads of one network pass; 0: one for each core.
    """

    weights: Path
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A running stack: the generator, and its address."""

    generator: Child
    address: str


@contextmanager
def running_retrieval(library: Path, logs: Path) -> Iterator[str]:
    """The address of a retrieval service over a copy of `library`, for as long as the block lasts; its log is kept in
    `logs`."""
    with _scratch(logs) as scratch, working_copy(library) as data:
        child, address = _start_retrieval(data, scratch)
        with running([child]):
            yield address


@contextmanager
def running_stack(library: Path, flags: GeneratorFlags, logs: Path) -> Iterator[Stack]:
    """Retrieval over a copy of `library` and generation, for as long as the block lasts; their logs are kept in `logs`.

    Both are started at once: loading the networks is what takes time.

    Raises:
        ChildFailed: one of them cannot start; the message is what it says.
        FolderInUse: another process has the library itself open.
    """
    with _scratch(logs) as scratch, working_copy(library) as data:
        address = f"unix:{scratch}/generator.sock"
        retrieval_address = f"unix:{scratch}/retrieval.sock"
        settings = {
            "address": address,
            "retrieval-address": retrieval_address,
            "weights": str(flags.weights.absolute()),
            "device": flags.device,
            "threads": str(flags.threads),
        }
        generator = _start("generator", "generator_svc", settings, scratch)
        retrieval, _ = _start_retrieval(data, scratch)
        with running([retrieval, generator]):
            yield Stack(generator=generator, address=address)


def _start_retrieval(data: Path, scratch: Path) -> tuple[Child, str]:
    address = f"unix:{scratch}/retrieval.sock"
    return _start("retrieval", "retrieval_svc", {"address": address, "data": str(data.absolute())}, scratch), address


def _start(name: str, module: str, settings: dict[str, str], scratch: Path) -> Child:
    quiet = {"log-level": "warning", "log-style": "text", "grace-s": GRACE_S}
    flags = [f"--{flag}={value}" for flag, value in (settings | quiet).items()]
    return Child(name, [module, "serve", *flags], scratch / f"{name}.log")


@contextmanager
def _scratch(logs: Path) -> Iterator[Path]:
    """A folder for sockets and logs. In the end the logs move to `logs`: two commands at once do not mix theirs."""
    with tempfile.TemporaryDirectory(prefix="reimagen-") as folder:
        try:
            yield Path(folder)
        finally:
            logs.mkdir(parents=True, exist_ok=True)
            for log in Path(folder).glob("*.log"):
                _move(log, logs / log.name)


def _move(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_bytes(source.read_bytes())
    os.replace(part, target)
