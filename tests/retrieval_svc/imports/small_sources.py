"""Small sources of every format, and a place to import into that shows what it got."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from retrieval_svc.imports.importer import run_import
from retrieval_svc.imports.records import Options, Record, Rejected, Source
from retrieval_svc.imports.report import Journal, Summary
from retrieval_svc.pairs import NewPair, Outcome, Upserted

NO_OPTIONS = Options()


class MemorySink:
    """Keeps pairs by id; `failing_at` is the number of the call that fails."""

    max_pairs, max_bytes = 4, 1 << 20
    identity = "memory"

    def __init__(self, failing_at: int = 0, error: Exception | None = None) -> None:
        self.pairs: dict[str, NewPair] = {}
        self.batches: list[list[str]] = []
        self.is_finished = False
        self._failing_at, self._error = failing_at, error

    def upsert(self, pairs: Sequence[NewPair]) -> list[Upserted]:
        if self._error is not None and len(self.batches) + 1 == self._failing_at:
            raise self._error
        self.batches.append([pair.pair_id for pair in pairs])
        return [self._one(pair) for pair in pairs]

    def _one(self, pair: NewPair) -> Upserted:
        before = self.pairs.get(pair.pair_id)
        self.pairs[pair.pair_id] = pair
        outcome = Outcome.CREATED if before is None else Outcome.REPLACED if before != pair else Outcome.UNCHANGED
        return Upserted(pair_id=pair.pair_id, outcome=outcome)

    def finish(self) -> None:
        self.is_finished = True


def run(source: Source, sink: Any, report: Path, options: Options = NO_OPTIONS) -> Summary:
    """Import into `sink`."""
    journal = Journal(report, fingerprint=source.fingerprint)
    return run_import(source, sink, options, journal, lambda count: None)


def read(source: Source) -> tuple[dict[str, Record], dict[str, Rejected]]:
    """Records and rejected ones by key; of a file with two faults the last."""
    items = list(source.records())
    records = {item.key: item for item in items if isinstance(item, Record)}
    rejected = {item.key: item for item in items if isinstance(item, Rejected)}
    assert len(records) == sum(isinstance(item, Record) for item in items)
    return records, rejected


def picture(number: int, kind: str = "PNG") -> bytes:
    """A small picture; another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 77)).save(stream, kind)
    return stream.getvalue()


def write_pictures(folder: Path, names: Iterable[str]) -> Path:
    """Pictures by their names; the kind is told by the suffix."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "PNG" if path.suffix == ".png" else "JPEG"))
    return folder


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, number: int, **described: Any) -> dict[str, bytes]:
    """The three files of one webdataset sample, as img2dataset writes them."""
    return {
        f"{key}.jpg": picture(number, "JPEG"),
        f"{key}.txt": f"caption of {key}".encode(),
        f"{key}.json": json.dumps({"key": key, "caption": f"caption of {key}", **described}).encode(),
    }


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], rows_per_group: int = 3) -> Path:
    """A parquet file in several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=rows_per_group)
    return path
