"""Locks: `packages/NAME.in` names packages, requirements.txt their versions, `packages/NAME.lock` every file by its sha256."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from deploy.images.catalog import ROOT, Lock

REQUIREMENTS = ROOT / "requirements.txt"
PLATFORM = "x86_64-manylinux_2_28"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A package of a lock: its version, and the sha256 of each file that may be installed."""

    version: str
    hashes: tuple[str, ...]


def write_lock(lock: Lock, *, torch_index: str = TORCH_INDEX, upgrade: bool = False) -> None:
    """Resolve a lock with uv; what is locked already stays as it is, but for what requirements.txt says, or `upgrade`.

    Raises:
        ValueError: uv finds no set of versions.
    """
    command = [f"{sysconfig.get_path('scripts')}/uv", "pip", "compile", "--quiet", "--generate-hashes"]
    command += ["--python-version", lock.python, "--python-platform", PLATFORM, "--only-binary", ":all:"]
    command += ["--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", "make image-locks"]
    command += ["--constraint", str(REQUIREMENTS.relative_to(ROOT)), "--output-file", str(lock.path.relative_to(ROOT))]
    if "+cpu" in lock.names.read_text():
        command += ["--find-links", torch_index]
    if upgrade:
        command.append("--upgrade")
    command.append(str(lock.names.relative_to(ROOT)))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{lock.name}: uv: {done.stderr}")


def read_lock(path: Path) -> dict[str, Pin]:
    """The packages of a lock by their normalized names (PEP 503).

    Raises:
        ValueError: a line is neither a pin nor a hash of one.
    """
    found: dict[str, Pin] = {}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        if not entry.strip() or entry.lstrip().startswith("#"):
            continue
        pin = _PIN.match(entry)
        if pin is None:
            raise ValueError(f"{path}: {entry!r} pins no version")
        found[normalized(pin[1])] = Pin(version=pin[2], hashes=tuple(_HASH.findall(entry)))
    return found


def read_names(path: Path) -> dict[str, str]:
    """The packages of a list by their normalized names, with the version that the list itself says, empty for none."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    found = {}
    for line in filter(None, lines):
        name, _, version = line.partition("==")
        found[normalized(name.split("[")[0])] = version
    return found


def normalized(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
