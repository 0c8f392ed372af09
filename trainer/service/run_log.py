"""What a run writes while it trains: lines of figures, and grids of samples. Read from any place on, while it writes."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
TRAIN, HELD_OUT = "train", "held_out"
CHUNK_BYTES = 256 << 10
TAIL_BYTES = 32 << 10
_GRID = re.compile(r"samples-(\d{1,18})\.png")
_PLACE = ("time", "step", "examples", "side", "kind")
_COUNTS, _END_S = range(1 << 63), 253_402_300_799  # what a message can hold: others, too, can write where runs do


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A line of the log; `time_s` since the epoch."""

    kind: str
    step: int
    examples: int
    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """What the averaged weights drew; `time_s` since the epoch."""

    step: int
    examples: int
    png: bytes
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, as its newest lines say it."""

    step: int
    examples: int
    examples_per_second: float
    loss: float | None
    time_s: float


class LogTail:
    """The lines of a run's log, from the first on, each once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._at = 0
        self._last = b""  # the line before `_at`
        self._line = 0  # how many are before it
        self._told = array("q")  # hashes of the lines, in order

    def read(self) -> list[Figures]:
        """What has come since; empty where nothing has. Of much only a part: ask again."""
        while True:
            content = self._read()
            whole = content.rfind(b"\n") + 1  # the last line may be half written
            if not whole and len(content) == CHUNK_BYTES:
                whole = len(content)  # no line of ours
            if not whole:
                return []
            lines = content[:whole].splitlines(keepends=True)
            self._at, self._last = self._at + whole, lines[-1]
            new = [line for line in lines if not self._passed(line)]
            if new:
                return list(_figures(b"".join(new)))

    def _passed(self, line: bytes) -> bool:
        """Go past a line; gives whether it was told before the log was cut behind it."""
        known = self._line < len(self._told) and self._told[self._line] == hash(line)
        if not known:
            del self._told[self._line :]
            self._told.append(hash(line))
        self._line += 1
        return known

    def _read(self) -> bytes:
        """From where we are, or from the first line on where the log was cut: by a run that went on from an earlier state."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._at - len(self._last))
                if stream.read(len(self._last)) != self._last:
                    self._at, self._last, self._line = 0, b"", 0
                    stream.seek(0)
                return stream.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""


class GridTail:
    """The sample grids of a run, each once, and again where it was drawn again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[Path, int] = {}

    def find(self) -> list[tuple[int, Path]]:
        """(examples, file) of those that have come since."""
        found = []
        for path in self._folder.glob("samples-*.png"):
            name = _GRID.fullmatch(path.name)
            if name is None:
                continue
            try:
                changed = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if self._told.get(path) != changed:
                self._told[path] = changed
                found.append((int(name[1]), path))
        return sorted(found)


class ProgressReader:
    """How far runs are, from the ends of their logs; what has not changed is not read again."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], Progress | None]] = {}

    def read(self, folder: Path) -> Progress | None:
        """None: the run has said nothing yet."""
        path = folder / LOG
        try:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                signature = status.st_size, status.st_mtime_ns
                if path in self._known and self._known[path][0] == signature:
                    return self._known[path][1]
                stream.seek(max(0, status.st_size - TAIL_BYTES))
                content = stream.read()
        except FileNotFoundError:
            return None
        found = _progress(list(_figures(content)))
        self._known[path] = signature, found
        return found


def _progress(lines: list[Figures]) -> Progress | None:
    if not lines:
        return None
    last = lines[-1]
    values = next((line.values for line in reversed(lines) if line.kind == TRAIN), {})
    return Progress(
        step=last.step,
        examples=last.examples,
        examples_per_second=values.get("examples_per_s", 0.0),
        loss=values.get("loss"),
        time_s=last.time_s,
    )


def _figures(content: bytes) -> Iterator[Figures]:
    for line in content.splitlines():
        try:
            said: dict[str, Any] = json.loads(line)
            values = {name: float(value) for name, value in said.items() if _is_figure(name, value)}
            kind, time_s = str(said["kind"]), float(said["time"])
            step, examples = int(said["step"]), int(said["examples"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue  # cut by a crash, or by where we began to read
        if kind.isprintable() and step in _COUNTS and examples in _COUNTS and 0 <= time_s < _END_S:
            yield Figures(kind=kind, step=step, examples=examples, time_s=time_s, values=values)


def _is_figure(name: str, value: Any) -> bool:
    return name not in _PLACE and name.isprintable() and isinstance(value, int | float)
