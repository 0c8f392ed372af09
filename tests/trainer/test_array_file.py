"""Arrays that are written row by row: the bytes of `np.save`, or an error."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from trainer.array_file import ArrayFile, array_file, write_array


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes, to whoever asks."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["<f2", "<i8", "|u1", ">f4"])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (7,), (12, 5), (3, 4, 4, 2)])
def test_the_bytes_are_those_of_numpy(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).uniform(0, 200, shape).astype(kind)
    np.save(tmp_path / "theirs.npy", array)
    write_array(tmp_path / "ours.npy", array)
    with array_file(tmp_path / "grown.npy", kind) as file:
        for start in range(0, max(1, len(array)), 2):
            file.append(array[start : start + 2])
    expected = (tmp_path / "theirs.npy").read_bytes()
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "grown.npy").read_bytes() == expected


def test_rows_are_of_one_shape_and_there_may_be_none(tmp_path: Path) -> None:
    with array_file(tmp_path / "a.npy", "<f4") as file:
        file.append(np.zeros((4, 2)))
        with pytest.raises(ValueError, match=r"rows: \[3\] is not \[2\]"):
            file.append(np.zeros((4, 3)))
    with array_file(tmp_path / "none.npy", "<f4"):
        pass
    assert np.load(tmp_path / "none.npy").shape == (0,)


@pytest.mark.parametrize("missing", [1, 4000, 9000])
def test_a_full_disk_is_an_error_to_the_last_byte(missing: int, tmp_path: Path) -> None:
    array = np.arange(1200.0)

    def in_rows(file: ArrayFile) -> None:
        for value in array:
            file.append(value[None])

    def grown() -> None:
        with array_file(tmp_path / "grown.npy", "<f8") as file:
            in_rows(file)

    ways: tuple[Callable[[], object], ...] = (lambda: write_array(tmp_path / "whole.npy", array), grown)
    for way in ways:
        way()
        with files_of_at_most(128 + array.nbytes - missing), pytest.raises(OSError, match="File too large"):
            way()
