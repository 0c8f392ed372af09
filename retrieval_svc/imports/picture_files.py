"""Picture files beside what describes them: found by name, read when their turn comes, never outside their folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.pictures import MAX_IMAGE_BYTES
from retrieval_svc.imports.records import IMAGE_SUFFIXES, Unreadable

MISSING = "picture missing"


def file_within(folder: Path, name: str) -> Path:
    """The file `name` of `folder`.

    Raises:
        Unreadable: the name leads out of the folder (also through a link), or there is no such file.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise Unreadable("picture outside the folder", name)
        if path.is_file():
            return path
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # a name that is too long, holds a zero byte, or goes in circles
        raise Unreadable(MISSING, f"{name!r} ({error})") from None
    raise Unreadable(MISSING, name)


def file_by_key(folder: Path, key: str) -> Path:
    """The picture of `key` in `folder`: `<key>`, `<key>.jpg` and so on, or in img2dataset's `<shard>/<key>.jpg`.

    Raises:
        Unreadable: there is none.
    """
    shard = key[:-4]  # img2dataset: five digits of the shard and four of the sample
    for stem in (key, f"{shard}/{key}" if shard else ""):
        for suffix in ("", *IMAGE_SUFFIXES):
            if stem:
                try:
                    return file_within(folder, stem + suffix)
                except Unreadable as error:
                    if error.reason != MISSING:
                        raise
    raise Unreadable(MISSING, f"{key} in {folder.name}")


def reader(path: Path) -> Callable[[], bytes]:
    """Reads the file when called; raises `Unreadable` for one that is larger than any picture may be, or empty."""
    return partial(_read, path)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise Unreadable("picture too large", f"{path.name} has {size} bytes; at most {MAX_IMAGE_BYTES} are taken")
        if image := path.read_bytes():
            return image
    except OSError as error:
        raise Unreadable("picture unreadable", f"{path.name} ({error.strerror})") from None
    raise Unreadable("picture empty", path.name)
