"""The pictures of a knowledge base: one memory-mapped file, so that memory holds none until asked."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path
from typing import BinaryIO

from common.service.errors import DataLoss


class ImageStore:
    """Reads pictures by offset and length, and checks each against its sha256."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            OSError, ValueError: it does not exist or is empty.
        """
        self._path = path
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, *, offset: int, length: int, sha256: str) -> bytes:
        """One picture as it was stored.

        Raises:
            DataLoss: what is stored there is not that picture.
        """
        image = self._map[offset : offset + length]
        if hashlib.sha256(image).hexdigest() != sha256:
            raise DataLoss(f"index: {self._path.name} is damaged at byte {offset}; build the index again")
        return image

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


class ImageStoreWriter:
    """Appends pictures to a stream; a picture that is there already is not written again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offsets: dict[bytes, int] = {}
        self._num_bytes = 0

    def add(self, image: bytes) -> tuple[int, bytes]:
        """Where the picture starts, and its sha256.

        Raises:
            OSError: the disk is full.
        """
        content = hashlib.sha256(image).digest()
        offset = self._offsets.get(content)
        if offset is None:
            offset = self._offsets[content] = self._num_bytes
            self._stream.write(image)
            self._num_bytes += len(image)
        return offset, content
