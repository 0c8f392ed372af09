"""A command's own copy of the library: one process at a time has a library open, and several commands may run at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from deploy.local.knowledge_base import locked
from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.manifest import IMAGES, MANIFEST

COPIES = "running"


@contextmanager
def working_copy(library: Path) -> Iterator[Path]:
    """A copy of `library` for as long as the block lasts. Pictures are linked, not copied: no file of them ever changes.

    Copies of commands that were killed are removed on the way.

    Raises:
        FolderInUse: a process has the library itself open, so that it may be changing.
        OSError: the disk is full.
    """
    folder = library.parent / COPIES
    with locked(library.parent), closing(FolderLock(library)):
        folder.mkdir(exist_ok=True)
        _remove_abandoned(folder)
        ours = Path(tempfile.mkdtemp(dir=folder))
        lock = FolderLock(ours)
        try:
            _copy(library, ours / library.name)
        except BaseException:
            lock.close()
            shutil.rmtree(ours, ignore_errors=True)
            raise
    try:
        yield ours / library.name
    finally:
        shutil.rmtree(ours, ignore_errors=True)
        lock.close()


def copy_library(library: Path, target: Path) -> None:
    """Copy `library` to `target`, a new folder that belongs to whoever asked; it is there whole or not at all.

    Raises:
        FolderInUse: a process has the library itself open, so that it may be changing.
        OSError: the disk is full.
    """
    part = target.with_name(f".{target.name}.part")
    with locked(library.parent), closing(FolderLock(library)):
        shutil.rmtree(part, ignore_errors=True)
        _copy(library, part)
        os.replace(part, target)


def _copy(library: Path, target: Path) -> None:
    for manifest in library.glob(f"*/{MANIFEST}"):
        source, copied = manifest.parent, target / manifest.parent.name
        copied.mkdir(parents=True)
        for part in source.iterdir():
            if part.name == IMAGES:
                shutil.copytree(part, copied / IMAGES, copy_function=_link)
            elif part.is_dir():
                copy_folder(part, copied / part.name)
        shutil.copy2(manifest, copied / MANIFEST)


def _link(source: str, target: str) -> str:
    os.link(source, target)
    return target


def _remove_abandoned(folder: Path) -> None:
    for copy in folder.iterdir():
        with suppress(FolderInUse, FileNotFoundError), closing(FolderLock(copy)):
            shutil.rmtree(copy, ignore_errors=True)
