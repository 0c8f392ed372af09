"""The pictures of a knowledge base: a file each, named after its sha256, so that equal pictures are stored once.

A picture is there as a whole or not at all: it is written under `incoming/`, fsynced, and renamed. Pictures that may
have lost their last pair are noted before the change that does it, so that a crash leaves no file that nobody knows.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from common.files import sync_folder, write_atomic
from common.service.errors import DataLoss

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = 2  # hexadecimal digits of a subfolder's name: 256 subfolders
_INCOMING = "incoming"
_NOTES = "maybe-unused"
_BATCH = 1000  # pictures asked for at once
_WRITERS = 16  # threads that wait for the disk together

InUse = Callable[[Sequence[str]], set[str]]


class ImageStore:
    """Content-addressed files. Safe to use from several threads; one process writes."""

    def __init__(self, folder: Path, *, writer: str = "") -> None:
        """Open the store in `folder`, which is made if it is not there.

        Args:
            writer: names this process among several that write; see `SharedImageStore`.

        Raises:
            OSError: it cannot be written.
        """
        self._folder = folder
        self._incoming = folder / (f"{_INCOMING}-{writer}" if writer else _INCOMING)
        self._notes = folder / (f"{_NOTES}-{writer}" if writer else _NOTES)
        self._locks = [threading.Lock() for _ in range(16**_PREFIX)]  # one a subfolder
        self._noting = threading.Lock()
        self._sweeping = threading.Lock()
        self._counting = threading.Lock()
        self._totals: tuple[int, int] | None = None
        self._incoming.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()  # of a process that was killed
        sync_folder(folder)

    @property
    def num_images(self) -> int:
        """How many pictures there are."""
        return self._count()[0]

    @property
    def num_bytes(self) -> int:
        """Their sizes together."""
        return self._count()[1]

    def put(self, image: bytes) -> str:
        """Store a picture and give its sha256 in hexadecimal; durable on return.

        Raises:
            OSError: the disk is full; nothing of the picture stays.
        """
        path = self._place(image)
        sync_folder(path.parent)
        return path.parent.name + path.name

    def put_all(self, images: Sequence[bytes]) -> list[str]:
        """The same of many, durable together on return; several times faster, as the disk is waited for by many at once.

        Raises:
            OSError: the disk is full; some of the pictures may have been stored.
        """
        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="images") as threads:
            paths = list(threads.map(self._place, images))
            for _ in threads.map(sync_folder, {path.parent for path in paths}):
                pass
        return [path.parent.name + path.name for path in paths]

    def _place(self, image: bytes) -> Path:
        """Write a picture where it belongs; its folder is to be synced by the caller, also where the picture was there:
        whoever wrote it may have been killed before doing so."""
        sha256 = hashlib.sha256(image).hexdigest()
        path = self._path(sha256)
        with self._lock(sha256):
            before = _size(path)
            # A file that is there may have been damaged since: it is compared, and written again.
            if before is None or _content(path) != image:
                self._write(path, image)
                self._add(int(before is None), len(image) - (before or 0))
        return path

    def read(self, sha256: str) -> bytes:
        """One picture as it was stored.

        Raises:
            DataLoss: it is missing, or is not that picture.
        """
        if not _SHA256.fullmatch(sha256):
            raise DataLoss(f"images: {sha256!r} is not a sha256")
        try:
            image = self._path(sha256).read_bytes()
        except FileNotFoundError:
            raise DataLoss(f"images: {sha256} is missing") from None
        if hashlib.sha256(image).hexdigest() != sha256:
            raise DataLoss(f"images: {sha256} is damaged; store the picture again")
        return image

    def note_maybe_unused(self, contents: Iterable[str]) -> None:
        """Note pictures that a change may leave without a pair; to be called before it. Durable on return.

        Contents that are not pictures of this store (URIs) are passed over.

        Raises:
            OSError: the disk is full.
        """
        noted = [content for content in contents if _SHA256.fullmatch(content)]
        if not noted:
            return
        path = self._notes
        with self._noting:
            is_new = not path.exists()
            with path.open("ab") as stream:
                # The line break before them ends a line that a crash may have cut short.
                stream.write(("\n" + "\n".join(noted) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
            if is_new:
                sync_folder(self._folder)

    def sweep(self, in_use: InUse) -> int:
        """Unlink the noted pictures that nobody has, and forget the notes; gives how many went.

        To be called while no change is under way that puts pictures: one that is put and whose pair is not yet
        stored would go. Cut short, it is done again at the next call.

        Args:
            in_use: gives those of the pictures that some pair has.
        """
        with self._sweeping:
            path = self._notes
            if not path.exists():
                return 0
            with self._noting:
                written = path.read_bytes()
            lines = dict.fromkeys(written.decode(errors="replace").split())
            noted = [line for line in lines if _SHA256.fullmatch(line)]
            num_removed = 0
            for start in range(0, len(noted), _BATCH):
                batch = noted[start : start + _BATCH]
                used = in_use(batch)
                num_removed += self._remove_all([sha256 for sha256 in batch if sha256 not in used], in_use)
            self._forget(len(written))
        return num_removed

    def _forget(self, num_bytes: int) -> None:
        """Drop the first bytes of the notes; what was noted since stays."""
        path = self._notes
        with self._noting:
            if later := path.read_bytes()[num_bytes:]:
                write_atomic(path, later)
            else:
                path.unlink()
                sync_folder(self._folder)

    def confirm(self, images: Sequence[bytes]) -> None:
        """Called after the pairs of pictures that were `put` are stored: nobody else unlinks here, so they are there."""

    def _remove_all(self, contents: Sequence[str], in_use: InUse) -> int:
        """Unlink pictures, durably; gives how many were there."""
        num_removed = 0
        for sha256 in contents:
            path = self._path(sha256)
            with self._lock(sha256):
                if (size := _size(path)) is not None:
                    path.unlink()
                    self._add(-1, -size)
                    num_removed += 1
        for folder in {self._path(sha256).parent for sha256 in contents}:
            if folder.exists():
                sync_folder(folder)
        return num_removed

    def _write(self, path: Path, image: bytes) -> None:
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync_folder(self._folder)
        handle, temporary = tempfile.mkstemp(dir=self._incoming)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(image)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:_PREFIX] / sha256[_PREFIX:]

    def _lock(self, sha256: str) -> threading.Lock:
        return self._locks[int(sha256[:_PREFIX], 16)]

    def _add(self, num_images: int, num_bytes: int) -> None:
        with self._counting:
            if self._totals is not None:
                self._totals = (self._totals[0] + num_images, self._totals[1] + num_bytes)

    def _count(self) -> tuple[int, int]:
        """Pictures and bytes: counted once, with the store held still; kept up to date from then on."""
        with ExitStack() as held:
            if self._totals is None:
                for lock in self._locks:
                    held.enter_context(lock)
            with self._counting:
                if self._totals is None:
                    folders = prefix_folders(self._folder)
                    sizes = [file.stat().st_size for folder in folders for file in os.scandir(folder)]
                    self._totals = (len(sizes), sum(sizes))
                return self._totals


def prefix_folders(folder: Path) -> list[Path]:
    """The folders of a store that hold its pictures; beside them lie notes and what is being written."""
    return [Path(entry.path) for entry in os.scandir(folder) if len(entry.name) == _PREFIX]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
