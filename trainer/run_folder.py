"""A run's folder: its log, its lock, and the description from which the run can be made again."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from common.files import write_json
from common.version import VERSION
from trainer.dataset import Prepared
from trainer.distributed import Ranks
from trainer.presets import Preset

LOG = "log.jsonl"
DESCRIPTION = "run.json"


def held(folder: Path) -> IO[str]:
    """Hold the run folder until the file that is given is closed: two writers would overwrite each other's states.

    Raises:
        ValueError: another process trains in this folder.
    """
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"run: {folder} is being trained by another process") from None
    return lock


def append_line(folder: Path, line: dict[str, Any]) -> None:
    """Append a line to the run's log, on a line of its own even after one that a crash has cut.

    Raises:
        OSError: the disk is full.
    """
    with (folder / LOG).open("a+b") as stream:
        end = stream.seek(0, 2)
        stream.seek(max(0, end - 1))
        cut = end > 0 and stream.read(1) != b"\n"
        text = json.dumps({"time": round(time.time(), 1)} | line) + "\n"
        stream.write((b"\n" if cut else b"") + text.encode())


def cut_log(folder: Path, step: int | None) -> int:
    """Cut the run's log where it tells of a step after `step`; gives how many lines go.

    Args:
        step: the one that a run goes on from: what it did after that is lost, and done again. None: it begins; a log that
            is there is put aside whole, as `log-1.jsonl` or the next name that is free, since its states may be elsewhere.
    """
    path = folder / LOG
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if step is None:
        if lines:
            names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        return len(lines)
    kept = next((i for i, line in enumerate(lines) if _step(line) > step), len(lines))
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))
    return len(lines) - kept


def _step(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # cut by a crash, or no line of ours
        return -1


def describe(
    folder: Path,
    preset: Preset,
    prepared: Prepared,
    ranks: Ranks,
    *,
    command: Sequence[str],
    device: str,
    step: int,
    warm_start: dict[str, Any] | None,
) -> None:
    """Write `run.json`: what is needed to make the run again. `starts` grows by one each time that the run goes on.

    Raises:
        ValueError: the run was trained on another corpus, so that no corpus would make it again.
    """
    before = _read(folder / DESCRIPTION)
    trained_on = before.get("corpus_fingerprint", prepared.fingerprint)
    if step and trained_on != prepared.fingerprint:
        raise ValueError(
            f"--data: {prepared.folder} is of corpus {prepared.fingerprint[:12]}…, and {folder} was trained on "
            f"{trained_on[:12]}…: to go on from its weights, give a new --run and --start-from {folder}"
        )
    start = {
        "time": round(time.time(), 1),
        "command": list(command),
        "from_step": step,
        "parallel": ranks.parallel,
        "ranks": ranks.world,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    write_json(
        folder / DESCRIPTION,
        {
            "preset": preset.to_json(),
            "corpus_fingerprint": prepared.fingerprint,
            "neighbors_sha256": hashlib.sha256(np.ascontiguousarray(prepared.neighbors).data).hexdigest(),
            "torch": torch.__version__,
            "command": list(command),
            "versions": {
                "reimagen": VERSION,
                "code_sha256": code_digest(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "warm_start": warm_start if warm_start is not None else before.get("warm_start"),
            "starts": [*before.get("starts", []), start],
        },
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def code_digest() -> str:
    """sha256 over the sources of `common` and `trainer`: it tells two runs of different code apart, without git."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for room in ("common", "trainer"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
