"""A folder of pictures with `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder), or a text file beside each.

A row names its picture in `file_name`, relative to the metadata's own folder; its other columns are told by `records`.
Pictures that no row names take their caption from `<picture>.txt` and more from `<picture>.json`, which is how
img2dataset writes plain files; without either they are rejected.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from retrieval_svc.imports.picture_files import file_within, reader
from retrieval_svc.imports.records import (
    IMAGE_SUFFIXES,
    Options,
    Record,
    Rejected,
    Source,
    SourceError,
    Unreadable,
    fingerprint_of,
    record_of,
    source_name,
)

METADATA = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"
_MAX_SIDECAR_BYTES = 1 << 20


def open_imagefolder(folder: Path, options: Options) -> Source:
    """The pictures of `folder` and of the folders in it.

    Raises:
        SourceError: `folder` is none, or holds no picture.
    """
    if not folder.is_dir():
        raise SourceError(f"imagefolder: {folder} is not a folder")
    tables = sorted(path for name in METADATA for path in folder.rglob(name))
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not pictures and not tables:
        raise SourceError(f"imagefolder: {folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return Source(
        name=options.name or source_name(folder.absolute().name),
        fingerprint=fingerprint_of("imagefolder", options, [*tables, *pictures]),
        records=partial(_records, folder, tables, pictures, options),
        num_records=None if tables else len(pictures),
    )


def _records(folder: Path, tables: list[Path], pictures: list[Path], options: Options) -> Iterator[Record | Rejected]:
    named: set[str] = set()
    for table in tables:
        rows = _json_rows(table) if table.suffix == ".jsonl" else _csv_rows(table)
        for line, row in rows:
            place = f"{table.relative_to(folder).as_posix()}:{line}"
            try:
                if isinstance(row, Unreadable):
                    raise row
                name = row.get(_FILE)
                if not isinstance(name, str) or not name.strip():
                    raise Unreadable("no file name", f"column {_FILE} is missing or empty")
                place = (table.parent.relative_to(folder) / name).as_posix()
                named.add(os.path.normpath(table.parent / name))
                path = file_within(table.parent, name)
                yield record_of(place, row, options=options, load=reader(path), used=(_FILE,))
            except Unreadable as error:
                yield Rejected(key=place, reason=error.reason, detail=error.detail)
    for path in pictures:
        if os.path.normpath(path) not in named:
            yield _from_sidecars(folder, path, options)


def _from_sidecars(folder: Path, path: Path, options: Options) -> Record | Rejected:
    key = path.relative_to(folder).as_posix()
    try:
        described = _sidecar(path.with_suffix(".json"))
        columns = json.loads(described) if described else {}
        if not isinstance(columns, dict):
            raise Unreadable("metadata unreadable", f"{path.stem}.json is no object")
        load = reader(file_within(folder, key))
        return record_of(key, columns, options=options, load=load, caption=_sidecar(path.with_suffix(".txt")))
    except Unreadable as error:
        return Rejected(key=key, reason=error.reason, detail=error.detail)
    except (ValueError, RecursionError) as error:
        return Rejected(key=key, reason="metadata unreadable", detail=f"{path.stem}.json ({error})")


def _sidecar(path: Path) -> str:
    """Its text; "" where there is none."""
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            raise Unreadable("metadata unreadable", f"{path.name} is larger than {_MAX_SIDECAR_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable("metadata unreadable", f"{path.name} ({error})") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Unreadable]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Unreadable("metadata unreadable", f"no JSON ({error})")
                continue
            yield number, row if isinstance(row, dict) else Unreadable("metadata unreadable", "no JSON object")


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Unreadable]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = csv.DictReader(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield rows.line_num, Unreadable("metadata unreadable", f"no CSV ({error})")
                continue
            yield rows.line_num, {name: value for name, value in row.items() if isinstance(name, str)}
