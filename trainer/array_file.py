"""NumPy arrays written from front to back, however many rows there will be; a full disk is an error.

NumPy's own ways are not that safe: `tofile` and `np.save` leave the end of an array to a buffer whose closing nobody asks
about (`fclose` in npy_PyFile_DupClose2), and writing to a memory map ends the process by a signal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np


class ArrayFile:
    """An array that grows by rows; see `array_file`."""

    def __init__(self, file: IO[bytes], kind: str) -> None:
        """`kind` as NumPy names types, with the order of bytes: "<f2"."""
        self._file, self._dtype = file, np.dtype(kind)
        self._row: tuple[int, ...] | None = None
        self._num_rows = 0

    def append(self, rows: np.ndarray) -> None:
        """Write rows [n, ...], of the shape that the first ones have.

        Raises:
            ValueError: these have another.
            OSError: the disk is full.
        """
        if self._row is None:
            self._row = rows.shape[1:]
            self._write_header()
        if rows.shape[1:] != self._row:
            raise ValueError(f"rows: {list(rows.shape[1:])} is not {list(self._row)}, the shape of those before")
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._num_rows += len(rows)

    def finish(self) -> None:
        """Say in the header how many there are."""
        self._row = self._row or ()
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        """NumPy leaves room in it for a first dimension of any length, so that it can be written again."""
        shape = (self._num_rows, *(self._row or ()))
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, described)


@contextmanager
def array_file(path: Path, kind: str) -> Iterator[ArrayFile]:
    """A new .npy file at `path`; it is whole when the block has ended well."""
    with path.open("wb") as file:
        growing = ArrayFile(file, kind)
        yield growing
        growing.finish()


def write_array(path: Path, array: np.ndarray) -> None:
    """What `np.save` writes, byte for byte; an OSError where the disk is full."""
    with array_file(path, array.dtype.str) as file:
        file.append(array)
