"""What stands beside a Tantivy index on disk: the cursor, and how a damaged index is noticed and put aside."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import sync_folder, write_json

_FORMAT = "reimagen-bm25/1"
_CURSOR = "cursor.json"
_META = "meta.json"
_DAMAGED = ".damaged"
_KINDS = ("term", "idx", "pos", "fieldnorm", "fast", "store")
_FOOTER_END = struct.Struct("<II")
_FOOTER_MAGIC = 1337
_CHUNK_BYTES = 1 << 20
_KILLED = "writer was killed"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far an index is.

    Attributes:
        generation: version of the newest change in it.
        epoch: marks the documents written since it was last begun anew; nanoseconds since 1970, or 0.
    """

    generation: int = 0
    epoch: int = 0


def read_cursor(folder: Path) -> Cursor:
    """The cursor of the index in `folder`.

    Raises:
        ValueError, KeyError, TypeError: it is not ours, or there is no index with it.
    """
    path = folder / _CURSOR
    if not path.exists():
        return Cursor()
    written = json.loads(path.read_text(encoding="utf-8"))
    if written["format"] != _FORMAT:
        raise ValueError(f"{path}: format {written['format']!r}, not {_FORMAT}")
    return Cursor(generation=int(written["generation"]), epoch=int(written["epoch"]))


def write_cursor(folder: Path, cursor: Cursor) -> None:
    """Keep the cursor, durably.

    Raises:
        OSError: the disk is full; the old one stays.
    """
    document = {"format": _FORMAT, "generation": cursor.generation, "epoch": cursor.epoch}
    write_json(folder / _CURSOR, document)


def check_files(folder: Path) -> None:
    """Compare each file of the index with the checksum in its footer, as Tantivy itself does not on opening.

    A file ends with a JSON object that holds the CRC-32 of what stands before it, the length of that object and a
    magic number (tantivy 0.27, src/directory/footer.rs).

    Raises:
        ValueError, KeyError, TypeError: a file is damaged, or all of them have gone.
        OSError: it cannot be read.
    """
    for path in _files(folder):
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            length, magic = _FOOTER_END.unpack(content[-_FOOTER_END.size :])
            end = len(content) - _FOOTER_END.size - length
            if magic != _FOOTER_MAGIC or end < 0:
                raise ValueError(f"{path}: no footer")
            crc = 0
            for start in range(0, end, _CHUNK_BYTES):
                crc = zlib.crc32(content[start : min(start + _CHUNK_BYTES, end)], crc)
            if json.loads(content[end : -_FOOTER_END.size])["crc"] != crc:
                raise ValueError(f"{path}: damaged")


def move_aside(folder: Path) -> None:
    """Rename `folder` to a name that ends with .damaged, in the place of an earlier one."""
    aside = folder.with_name(folder.name + _DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    sync_folder(folder.parent)


def _files(folder: Path) -> list[Path]:
    """Those that the index consists of; others may lie there, half-written by a process that was killed."""
    if not (folder / _META).exists():
        if (folder / _CURSOR).exists():
            raise ValueError(f"{folder}: a cursor without an index")
        return []
    names: list[str] = []
    for segment in json.loads((folder / _META).read_text(encoding="utf-8"))["segments"]:
        stem = segment["segment_id"].replace("-", "")
        names += [f"{stem}.{kind}" for kind in _KINDS]
        if segment["deletes"] is not None:
            names.append(f"{stem}.{segment['deletes']['opstamp']}.del")
    return [folder / name for name in names]


def system_error(error: BaseException, commit: Callable[[], object]) -> int:
    """The system's number of a failed write, which Tantivy reports as a ValueError that holds it; 0: it is none.

    Args:
        error: what the writer raised.
        commit: of the writer. On adding, a killed writer only says that it was; why is said on committing, which it cannot.
    """
    said = str(error) if isinstance(error, ValueError) else ""
    if _KILLED in said:
        try:
            commit()
        except ValueError as cause:
            said = str(cause)
    number = _OS_ERROR.search(said)
    return int(number[1]) if number else 0
