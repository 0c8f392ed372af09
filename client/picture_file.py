"""A picture as the bytes of a file: kept, or opened by a library that the caller has."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

from client.outputs import write_output


class PictureFile:
    """Something whose `image` is an encoded picture."""

    image: bytes

    def save(self, path: str | Path) -> Path:
        """Write the file as it came, so that it holds its record; the old file stays where that fails.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        return write_output(Path(path), self.image)

    def pil(self) -> Any:
        """A `PIL.Image.Image`. The client itself needs no Pillow: it is loaded here, where it is asked for.

        Raises:
            ModuleNotFoundError: Pillow is not installed.
        """
        return import_module("PIL.Image").open(io.BytesIO(self.image))

    def array(self) -> Any:
        """A `numpy.ndarray`, uint8 [H, W, 3].

        Raises:
            ModuleNotFoundError: NumPy or Pillow is not installed.
        """
        return import_module("numpy").asarray(self.pil().convert("RGB"))
