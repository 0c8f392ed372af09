"""Folders of runs that are deleted: renamed aside, which is all or nothing, and then removed."""

from __future__ import annotations

import fcntl
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import sync_folder
from common.service.errors import FailedPrecondition
from trainer.service.spec_rules import OF_OTHERS

SUFFIX = ".deleted"
LOCK = "lock"  # of a run's folder: held by whoever trains in it

log = logging.getLogger(__name__)


def set_aside(folder: Path) -> Path | None:
    """Rename a run's folder, durably: it is no run's any more. Gives what it is called now; None: there was none.

    Raises:
        FailedPrecondition: somebody trains in it, or it holds a corpus or weights.
        OSError: it cannot be renamed, and is as it was.
    """
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}{SUFFIX}"
    with _unused(folder):
        strange = sorted(name for name in OF_OTHERS if (folder / name).exists())
        if strange:
            raise FailedPrecondition(
                f"run: the folder of {folder.name!r} holds {strange[0]}, which is not a run's", reason="FOLDER_IN_USE"
            )
        try:
            folder.rename(aside)
        except FileNotFoundError:
            log.warning("deleted run had no folder", extra={"run": folder.name})
            return None
    try:
        sync_folder(folder.parent)
    except OSError as error:  # renamed it is; after a crash of the machine it may be there again
        log.warning("deletion not synced", extra={"run": folder.name, "error": str(error)})
    return aside


def discard(aside: Path) -> None:
    """Remove what was set aside; what cannot be removed now, the next service removes."""
    try:
        if aside.is_symlink():
            aside.unlink()
        else:
            shutil.rmtree(aside)
    except OSError as error:
        log.error("deleted run not removed from disk", extra={"folder": aside.name, "error": str(error)})


def discard_all(runs: Path) -> None:
    """Remove what services have set aside that ended before they had removed it."""
    for aside in runs.glob(f".*{SUFFIX}"):
        discard(aside)


@contextmanager
def _unused(folder: Path) -> Iterator[None]:
    try:
        lock = (folder / LOCK).open("r")  # flock asks for no more, and another user's lock can be read
    except FileNotFoundError:  # nobody has trained in it
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"run: another process trains in the folder of {folder.name!r}", reason="FOLDER_IN_USE"
            ) from None
        yield
