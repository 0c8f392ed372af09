"""Pictures in a folder that several replicas write to, such as a network volume; see `ImageStore`.

A picture that has lost its last pair may get a new one on another replica at the same moment. So whoever unlinks it moves
it away first, asks once more, and puts it back if some pair has it by now; whoever has stored a pair looks afterwards
whether its picture is still there, and writes it again. One of the two sees the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from common.files import sync_folder
from common.service.errors import DataLoss
from retrieval_svc.image_store import ImageStore, InUse, prefix_folders

_LEAVING = "leaving"
_RETRIES, _RETRY_S = 5, 0.02  # of reading a picture that is moved away and back


class SharedImageStore(ImageStore):
    """The same files; each writer has its own notes and its own place for what comes and goes."""

    def __init__(self, folder: Path, *, writer: str) -> None:
        """`writer` names this replica for good: what it has left undone is done when it comes back.

        Raises:
            OSError: the folder cannot be written.
        """
        super().__init__(folder, writer=writer)
        self._leaving = folder / f"{_LEAVING}-{writer}"
        self._leaving.mkdir(exist_ok=True)
        for path in list(self._leaving.iterdir()):  # of a process that was killed; the notes still name it
            self._put_back(path.name)

    def read(self, sha256: str) -> bytes:
        """One picture as it was stored. Raises DataLoss: it is missing, or is not that picture."""
        for _ in range(_RETRIES):
            try:
                return super().read(sha256)
            except DataLoss:
                time.sleep(_RETRY_S)
        return super().read(sha256)

    def confirm(self, images: Sequence[bytes]) -> None:
        """Write those again that another replica has unlinked meanwhile."""
        self.put_all(images)

    def _remove_all(self, contents: Sequence[str], in_use: InUse) -> int:
        moved = [sha256 for sha256 in contents if self._move_away(sha256)]
        used = in_use(moved) if moved else set()
        for sha256 in moved:
            if sha256 in used:
                self._put_back(sha256)
            else:
                (self._leaving / sha256).unlink()
        for folder in {self._leaving, *(self._path(sha256).parent for sha256 in moved)}:
            sync_folder(folder)
        return len(moved) - len(used)

    def _move_away(self, sha256: str) -> bool:
        try:
            os.replace(self._path(sha256), self._leaving / sha256)
        except FileNotFoundError:
            return False
        return True

    def _put_back(self, sha256: str) -> None:
        path = self._path(sha256)
        path.parent.mkdir(exist_ok=True)
        os.replace(self._leaving / sha256, path)
        sync_folder(path.parent)

    def _count(self) -> tuple[int, int]:
        """Counted each time, for others write as well."""
        sizes: list[int] = []
        for folder in prefix_folders(self._folder):
            for entry in os.scandir(folder):
                try:
                    sizes.append(entry.stat().st_size)
                except FileNotFoundError:
                    continue  # unlinked meanwhile
        return len(sizes), sum(sizes)
