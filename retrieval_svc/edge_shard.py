"""One shard of Qdrant's engine in this process: how it is made, opened, written to and asked. Knows no pairs.

Three facts of `qdrant-edge-py` 0.9 shape this file. Every call holds the interpreter's lock, so that no two calls overlap
and a long one stops all threads: building the graph is done by another process. The engine's write-ahead log survives
the death of the process but is not synced, so it is synced here. The engine writes through memory maps: on a full disk
the process would be killed (SIGBUS), so that room is checked before each write.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import qdrant_edge as qdrant

from common.files import sync_folder
from common.service.errors import DataLoss, FailedPrecondition
from retrieval_svc.payload import (
    BM25_VECTOR,
    BOOL_FIELDS,
    CLIP_VECTOR,
    INTEGER_FIELDS,
    KEYWORD_FIELDS,
    LINKED_FIELDS,
    Conditions,
)
from retrieval_svc.point_store import Found, Row
from retrieval_svc.sparse import SparseVector

_WAL = "wal"
_MAX_SEGMENT_KB = 16 << 20  # one segment, one graph: fewer hops than several of them
_MAX_SCAN_KB = 10_000
_COPY_BYTES = 64 << 10
_BLOCK_BYTES = 512  # of st_blocks, whatever the file system's
_LOOK_S = 0.2
_BUILD = "import sys; from retrieval_svc.edge_shard import build; build(sys.argv[1])"


@dataclass(frozen=True, kw_only=True)
class VectorSettings:
    """How embeddings are indexed and searched.

    Attributes:
        m: edges of a node of the HNSW graph. ef_construct: candidates while it is built.
        hnsw_ef: candidates of a search; more find more of the true neighbours, and take longer.
        exact_below_kib: a segment with fewer KiB of embeddings gets no graph and is compared as a whole.
        quantization: int8 searches by a quarter of each embedding's bytes, which takes a third of the time, and compares the
            best once more with the originals; None: the originals alone.
        oversampling: so many times the asked number are taken from the quantized search.
        unflushed_points: after so many written points the engine is flushed, which bounds the log that a start replays.
        reserve_bytes: room on the disk below which writes are refused.
    """

    m: int = 16
    ef_construct: int = 100
    hnsw_ef: int = 128
    exact_below_kib: int = _MAX_SCAN_KB
    quantization: Literal["int8"] | None = "int8"
    oversampling: float = 2.0
    unflushed_points: int = 10_000
    reserve_bytes: int = 256 << 20


class Shard:
    """An open shard folder; whoever holds it has it alone (the engine locks its log). Not to be written by two threads."""

    def __init__(self, folder: Path, settings: VectorSettings, *, new_for_size: int | None = None) -> None:
        """Open the shard in `folder`, replaying what its log holds.

        With `new_for_size`, the size of its embeddings, the settings are new to it: its graph follows them when it is
        built next.

        Raises:
            FailedPrecondition: it is open already, here or in another process.
            DataLoss: it is not there, or damaged.
        """
        self.folder = folder
        self._settings = settings
        self._unflushed = 0
        config = None if new_for_size is None else _config(new_for_size, settings)
        try:
            self._engine = qdrant.EdgeShard.load(str(folder), config)
        except Exception as error:
            if "WouldBlock" in str(error):
                raise FailedPrecondition(f"{folder} is open already, here or in another process") from error
            raise DataLoss(f"{folder} cannot be opened: {error}") from error

    def write(self, rows: Sequence[Row]) -> None:
        """Add or replace points, whole; durable on return."""
        self._update(qdrant.UpdateOperation.upsert_points([_point(row) for row in rows]), len(rows))

    def forget(self, points: Sequence[str]) -> None:
        """Remove points, leaving nothing; durable on return."""
        self._update(qdrant.UpdateOperation.delete_points(list(points)), len(points))

    def flush(self) -> None:
        """Write everything from the log to its place."""
        with _engine_errors(self.folder):
            self._engine.flush()
        self._unflushed = 0

    def close(self) -> None:
        """Flush and let go of the files."""
        if self._unflushed:
            self.flush()
        self._engine.close()

    def retrieve(self, points: Sequence[str], *, with_embeddings: bool) -> list[Found]:
        """Those of `points` that are there, live or deleted."""
        with _engine_errors(self.folder):
            records = self._engine.retrieve(
                list(points), with_payload=True, with_vector=[CLIP_VECTOR] if with_embeddings else False
            )
        return [_found(record) for record in records]

    def scroll(self, wanted: Conditions, *, limit: int, after: str) -> tuple[list[Found], str]:
        """Points in the order of their ids, and the id of the next one ("" at the end)."""
        request = qdrant.ScrollRequest(offset=after or None, limit=limit, filter=_filter(wanted), with_payload=True)
        with _engine_errors(self.folder):
            records, following = self._engine.scroll(request)
        return [_found(record) for record in records], "" if following is None else str(following)

    def by_version(self, *, limit: int, at_least: float = 0.0, newest_first: bool = False) -> list[Found]:
        """Points in the order of their versions, from about `at_least`."""
        direction = qdrant.Direction.Desc if newest_first else qdrant.Direction.Asc
        order = qdrant.OrderBy("version", direction=direction)
        above = qdrant.Filter(must=[qdrant.FieldCondition("version", range=qdrant.RangeFloat(gte=at_least))])
        request = qdrant.ScrollRequest(
            limit=limit, order_by=order, with_payload=True, filter=above if at_least else None
        )
        with _engine_errors(self.folder):
            return [_found(record) for record in self._engine.scroll(request)[0]]

    def count(self, wanted: Conditions) -> int:
        """How many points match, exactly."""
        with _engine_errors(self.folder):
            return self._engine.count(qdrant.CountRequest(exact=True, filter=_filter(wanted)))

    def values(self, field: str, wanted: Conditions, limit: int) -> set[str]:
        """The values of a keyword field among the matching points."""
        request = qdrant.FacetRequest(field, limit=limit, exact=True, filter=_filter(wanted))
        with _engine_errors(self.folder):
            return {str(hit.value) for hit in self._engine.facet(request)}

    def nearest(
        self,
        query: np.ndarray | SparseVector,
        wanted: Conditions,
        *,
        limit: int,
        exact: bool,
        with_embeddings: bool,
        fields: Sequence[str] = (),
    ) -> list[Found]:
        """The best points for an embedding, or for a sparse vector; with these fields of the payload, or all of it."""
        if isinstance(query, SparseVector):
            sparse = qdrant.SparseVector(indices=list(query.indices), values=list(query.values))
            asked = qdrant.Query.Nearest(sparse, using=BM25_VECTOR)
        else:
            asked = qdrant.Query.Nearest(query.tolist(), using=CLIP_VECTOR)
        quantized = qdrant.QuantizationSearchParams(
            ignore=exact, rescore=True, oversampling=None if exact else self._settings.oversampling
        )
        request = qdrant.QueryRequest(
            query=asked,
            limit=limit,
            filter=_filter(wanted),
            params=qdrant.SearchParams(hnsw_ef=self._settings.hnsw_ef, exact=exact, quantization=quantized),
            with_payload=list(fields) or True,
            with_vector=[CLIP_VECTOR] if with_embeddings else False,
        )
        with _engine_errors(self.folder):
            return [_found(point, point.score) for point in self._engine.query(request)]

    def _update(self, operation: qdrant.UpdateOperation, num_points: int) -> None:
        _check_free(self.folder, self._settings.reserve_bytes)
        with _engine_errors(self.folder):
            self._engine.update(operation)
        self._unflushed += num_points
        if self._unflushed >= self._settings.unflushed_points:
            self.flush()
        else:
            _sync_files(self.folder / _WAL)


def create(folder: Path, *, embedding_size: int, settings: VectorSettings) -> None:
    """Make an empty shard in `folder`, with an index for every field that is filtered by; 0: without embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    with _engine_errors(folder):
        engine = qdrant.EdgeShard.create(str(folder), _config(embedding_size, settings))
        # The engine links the graph once more for each field that searches by embedding are filtered by, and no other.
        kinds = (
            (KEYWORD_FIELDS, lambda linked: qdrant.KeywordIndexParams(enable_hnsw=linked)),
            (BOOL_FIELDS, lambda linked: qdrant.BoolIndexParams(enable_hnsw=linked)),
            (INTEGER_FIELDS, lambda linked: qdrant.IntegerIndexParams(lookup=True, range=True, enable_hnsw=linked)),
        )
        for fields, kind in kinds:
            for field in fields:
                engine.update(qdrant.UpdateOperation.create_field_index(field, kind(field in LINKED_FIELDS)))
        engine.flush()
        engine.close()


def build(folder: str) -> None:
    """Merge the segments of a closed shard and build its graph: minutes of work that stop this process's threads."""
    engine = qdrant.EdgeShard.load(folder)
    engine.optimize()
    engine.flush()
    engine.close()


def build_apart(folder: Path, is_stopped: threading.Event) -> None:
    """`build` in another process. Raises RuntimeError with what it said when it fails, and when it `is_stopped`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", _BUILD, str(folder)]
    said = ""
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.returncode is None:
            try:
                _, said = process.communicate(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                if is_stopped.is_set():
                    process.kill()
    if is_stopped.is_set():
        raise RuntimeError(f"building the graph of {folder} was stopped")
    if process.returncode:
        raise RuntimeError(f"building the graph of {folder} ended with {process.returncode}: {said[-2000:]}")


def check_room(folder: Path, settings: VectorSettings) -> None:
    """Raise OSError if the disk has no room for a copy of the shard in `folder` and for what is built from it."""
    used = sum(path.stat().st_blocks * _BLOCK_BYTES for path in folder.rglob("*"))
    _check_free(folder, 2 * used + settings.reserve_bytes)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a flushed shard. The engine sets files up in advance: what is empty of them stays a hole and takes no room."""
    for path in sorted(source.rglob("*")):
        copied = target / path.relative_to(source)
        if path.is_dir():
            copied.mkdir(parents=True, exist_ok=True)
            continue
        copied.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reading, copied.open("wb") as writing:
            while block := reading.read(_COPY_BYTES):
                if block.count(0) == len(block):
                    writing.seek(len(block), os.SEEK_CUR)
                else:
                    writing.write(block)
            writing.truncate(writing.tell())


def _filter(wanted: Conditions) -> qdrant.Filter | None:
    must: list[Any] = [_match(field, values) for field, values in wanted.must]
    must_not: list[Any] = [_match(field, values) for field, values in wanted.must_not]
    if wanted.has_embedding:
        must.append(qdrant.HasVectorCondition(CLIP_VECTOR))
    if wanted.not_points:
        must_not.append(qdrant.HasIdCondition(set(wanted.not_points)))
    if wanted.is_deleted is not None:
        (must_not if wanted.is_deleted else must).append(qdrant.IsEmptyCondition("deleted"))
    return qdrant.Filter(must=must, must_not=must_not) if must or must_not else None


def _found(record: Any, score: float = 0.0) -> Found:
    vector = record.vector.get(CLIP_VECTOR) if isinstance(record.vector, Mapping) else None
    embedding = None if vector is None else np.asarray(vector, dtype=np.float32)
    return Found(point=str(record.id), payload=record.payload or {}, embedding=embedding, score=score)


def _match(field: str, values: Sequence[str]) -> qdrant.FieldCondition:
    if len(values) == 1:
        return qdrant.FieldCondition(field, match=qdrant.MatchValue(values[0]))
    return qdrant.FieldCondition(field, match=qdrant.MatchAny(list(values)))


def _point(row: Row) -> qdrant.Point:
    vectors: dict[str, Any] = {}
    if row.embedding is not None:
        vectors[CLIP_VECTOR] = row.embedding.tolist()
    if row.sparse is not None and row.sparse.indices:
        vectors[BM25_VECTOR] = qdrant.SparseVector(indices=list(row.sparse.indices), values=list(row.sparse.values))
    return qdrant.Point(row.point, vectors, dict(row.payload))


def _config(embedding_size: int, settings: VectorSettings) -> qdrant.EdgeConfig:
    int8 = qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, quantile=0.99, memory=qdrant.Memory.Pinned)
    clip = qdrant.EdgeVectorParams(size=embedding_size, distance=qdrant.Distance.Cosine)
    return qdrant.EdgeConfig(
        vectors={CLIP_VECTOR: clip} if embedding_size else None,
        sparse_vectors={BM25_VECTOR: qdrant.EdgeSparseVectorParams(modifier=qdrant.Modifier.Idf)},
        hnsw_config=qdrant.HnswIndexConfig(settings.m, settings.ef_construct, settings.exact_below_kib),
        quantization_config=int8 if settings.quantization == "int8" else None,
        optimizers=qdrant.EdgeOptimizersConfig(
            default_segment_number=1, max_segment_size=_MAX_SEGMENT_KB, indexing_threshold=settings.exact_below_kib
        ),
    )


def _check_free(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"only {free} bytes are free where {folder} is, and {wanted} must be in reserve")


def _sync_files(folder: Path) -> None:
    """fsync every file of `folder`, which on Linux also writes out pages changed through memory maps."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


@contextmanager
def _engine_errors(folder: Path) -> Iterator[None]:
    """The engine reports everything as a bare Exception."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        if "No space left" in str(error) or "os error 28" in str(error):
            raise OSError(errno.ENOSPC, f"{folder}: {error}") from error
        raise DataLoss(f"{folder}: {error}") from error
