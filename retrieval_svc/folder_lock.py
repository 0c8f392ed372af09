"""One process at a time: a lock on a folder that the kernel lets go of when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

LOCK = "lock"


class FolderInUse(ValueError):
    """Another process has the folder open; the message names both."""


class FolderLock:
    """Holds `<folder>/lock` (flock) until it is closed. The file itself stays."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            FolderInUse: somebody has it.
            OSError: the folder cannot be written.
        """
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(self._descriptor)
            whose = f"process {holder}" if holder.isdigit() else "another process"
            raise FolderInUse(f"{folder} is in use by {whose}") from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go; again is no error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
