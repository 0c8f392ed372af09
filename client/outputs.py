"""The files that a command leaves: all of them, or none."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Raises OSError where `folder` is no folder that we may write into, nor can be made one."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))


def write_outputs(folder: Path, files: Mapping[str, bytes], *, companions: Iterable[str] = ()) -> list[Path]:
    """Write `files` (name to content) into `folder`; `companions` of an earlier picture that are not among them go.

    Everything is written and flushed under temporary names before the first file takes its place.

    Raises:
        OSError: the disk is full, or the folder cannot be written; it is then as it was before.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".reimagen-", suffix=".part"))
    written = False
    try:
        for name, content in files.items():
            _write(scratch / name, folder / name, content)
        for name in files:
            os.replace(scratch / name, folder / name)
        written = True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not written:
            shutil.rmtree(folder, ignore_errors=True)
    for name in companions:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    _sync_folder(folder)
    return [folder / name for name in files]


def write_output(path: Path, content: bytes) -> Path:
    """Write one file, and the folders to it.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was before.
    """
    write_outputs(path.absolute().parent, {path.name: content})
    return path


def _write(path: Path, final: Path, content: bytes) -> None:
    try:
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:  # a full disk says neither its name nor that of the file
        raise OSError(error.errno, error.strerror, str(final)) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (POSIX: the directory entry needs its own fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
