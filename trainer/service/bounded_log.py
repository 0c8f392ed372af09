"""What a command says, on disk: its beginning and its end, of at most so many bytes together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

NEWEST, BEFORE, BEGINNING = "output.log", "output.1.log", "output.head.log"
MAX_BYTES = 16 << 20
_CHUNK = 64 << 10


class BoundedLog:
    """Three parts of a third of the bytes each: when the newest is full it becomes the beginning, later on the one before.

    What was said between the beginning and the last one or two parts is dropped.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Begin anew: what an earlier command has said is removed.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder = folder
        self._part_bytes = max(1, max_bytes // 3)
        for name in (BEFORE, BEGINNING):
            (folder / name).unlink(missing_ok=True)
        self._newest = (folder / NEWEST).open("wb", buffering=0)
        self._size = 0

    def write(self, said: bytes) -> None:
        """Add what was said. Where the disk is full it is lost: whoever says it is not to wait or to end for that."""
        with suppress(OSError):
            while said:
                if self._size >= self._part_bytes:
                    self._turn()
                written = self._newest.write(said[: self._part_bytes - self._size]) or 0
                self._size += written
                said = said[written:]

    def take_all(self, pipe: IO[bytes]) -> None:
        """Add what comes through a pipe, until all have closed it."""
        while said := os.read(pipe.fileno(), _CHUNK):
            self.write(said)

    def _turn(self) -> None:
        self._newest.close()
        becomes = BEFORE if (self._folder / BEGINNING).exists() else BEGINNING
        try:
            os.replace(self._folder / NEWEST, self._folder / becomes)
        finally:
            self._newest, self._size = (self._folder / NEWEST).open("wb", buffering=0), 0


def last_bytes(folder: Path, count: int) -> bytes:
    """The last `count` bytes of what is kept, or all of it; empty where nothing is."""
    found = b""
    for name in _newest_first(folder):
        with suppress(OSError), (folder / name).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - (count - len(found))))
            found = stream.read(count) + found
        if len(found) >= count:
            break
    return found


def _newest_first(folder: Path) -> Sequence[str]:
    """The parts that follow on one another: nothing lies between the beginning and the newest until there is one before."""
    return (NEWEST, BEFORE) if (folder / BEFORE).exists() else (NEWEST, BEGINNING)
