"""LAION-style parquet: an address, a caption and what else is known, with the pictures on this machine.

A row's picture is the file that a path column names, or `<key>.jpg` in the folder of pictures. Rows without one become
pairs with an address if that is asked for. Files are read a few hundred rows at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_svc.imports.picture_files import MISSING, file_by_key, file_within, reader
from retrieval_svc.imports.records import (
    Options,
    Record,
    Rejected,
    Source,
    SourceError,
    Unreadable,
    fingerprint_of,
    plain,
    record_of,
    source_name,
)

ROWS_AT_ONCE = 256
KEY_COLUMNS = ("key", "id", "image_id", "sample_id")
PATH_COLUMNS = ("local_path", "image_path", "file_name", "path")
URI_COLUMNS = ("url", "image_url", "image_uri")


def open_parquet(path: Path, options: Options) -> Source:
    """One file, or all `*.parquet` of a folder in the order of their names.

    Raises:
        SourceError: there is none, or one of them is no parquet.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"parquet: {path} holds no *.parquet")
    if options.images is not None and not options.images.is_dir():
        raise SourceError(f"parquet: --images: {options.images} is not a folder")
    total = 0
    for file in files:
        try:
            total += pq.read_metadata(file).num_rows
        except (pa.ArrowException, ValueError) as error:
            raise SourceError(f"parquet: {file} cannot be read ({plain(error)})") from None
    return Source(
        name=options.name or source_name(path.absolute().name.removesuffix(".parquet")),
        fingerprint=fingerprint_of("parquet", options, files),
        records=partial(_records, files, options),
        num_records=total,
    )


def _records(files: list[Path], options: Options) -> Iterator[Record | Rejected]:
    for file in files:
        row = 0
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
                    for columns in batch.to_pylist():
                        row += 1
                        yield _record(file, row, columns, options)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield Rejected(key=f"{file.name}:{row + 1}", reason="file damaged", detail=f"{plain(error)}; not read on")


def _record(file: Path, row: int, columns: Mapping[str, Any], options: Options) -> Record | Rejected:
    lower = {str(name).lower(): value for name, value in columns.items()}
    uri = plain(_first(lower, URI_COLUMNS))
    key = plain(_first(lower, KEY_COLUMNS)) or _key_of_address(lower, uri) or f"{file.stem}-{row}"
    try:
        load = _picture(file, key, lower, options)
        if load is None and not (options.keep_uris and uri):
            raise Unreadable(MISSING, f"no local picture of {key}" + ("" if uri else ", and no address"))
        record = record_of(key, columns, options=options, load=load, used=(*KEY_COLUMNS, *PATH_COLUMNS))
        return replace(record, image_uri="" if load else uri)
    except Unreadable as error:
        return Rejected(key=key, reason=error.reason, detail=error.detail)


def _picture(file: Path, key: str, lower: Mapping[str, Any], options: Options) -> Callable[[], bytes] | None:
    """Reads the row's picture; None where there is none on this machine."""
    folder = options.images or file.parent
    try:
        if name := _first(lower, PATH_COLUMNS):
            return reader(file_within(folder, str(name)))
        if options.images is not None:
            return reader(file_by_key(folder, key))
    except Unreadable as error:
        if error.reason != MISSING:
            raise
    return None


def _first(lower: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((lower[name] for name in names if lower.get(name) not in (None, "")), None)


def _key_of_address(lower: Mapping[str, Any], uri: str) -> str:
    """A key that does not depend on the order of rows, of the address and the caption."""
    if not uri:
        return ""
    caption = plain(_first(lower, ("caption", "text")))
    return hashlib.sha256(f"{uri}\n{caption}".encode("utf-8", "backslashreplace")).hexdigest()[:24]
