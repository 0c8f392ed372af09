"""The pairs of a knowledge base on this machine: Qdrant's engine in process, crash-safe, in one folder.

The folder holds `store.json`, which names the shard folder in use, and that folder. To build the graph, the shard is copied,
another process builds the copy, what has changed meanwhile is written into it, and `store.json` names it: searching
and writing go on, and dying at any point leaves one of the two.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import replacing_folder, write_json
from common.service.errors import DataLoss
from retrieval_svc import edge_shard
from retrieval_svc.edge_shard import Shard, VectorSettings
from retrieval_svc.point_store import BATCH, PointStore, copied
from retrieval_svc.shared_use import SharedUse

FORMAT = "reimagen-pairs/1"

_MANIFEST = "store.json"
_SHARD = "shard-"


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    embedding_size: int
    shard: str


class EdgePairStore(PointStore):
    """A `PairStore` (and `SparseStore`) in a folder that one process at a time can open."""

    def __init__(self, folder: Path, manifest: _Manifest, shard: Shard, settings: VectorSettings) -> None:
        """See `open` and `create`."""
        super().__init__()
        self._folder = folder
        self._manifest = manifest
        self._shard = shard
        self._settings = settings
        self._optimizing = threading.Lock()
        self._is_stopped = threading.Event()
        self._use = SharedUse()  # of the shard: closed and replaced by who holds it alone
        self._is_closed = False
        self._touched: set[str] | None = None  # points written since the shard was copied, while a graph is built

    @classmethod
    def create(cls, folder: Path, *, embedding_size: int, settings: VectorSettings | None = None) -> EdgePairStore:
        """Make an empty store; `folder` must not exist, or be empty. 0: it holds no embeddings.

        Raises:
            ValueError: the folder holds something, or the size cannot be.
        """
        if embedding_size < 0:
            raise ValueError(f"embedding_size {embedding_size} is below 0")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty")
        settings = settings or VectorSettings()
        manifest = _Manifest(embedding_size=embedding_size, shard=f"{_SHARD}1")
        with replacing_folder(folder) as made:
            edge_shard.create(made / manifest.shard, embedding_size=embedding_size, settings=settings)
            _write_manifest(made, manifest)
        return cls(folder, manifest, Shard(folder / manifest.shard, settings), settings)

    @classmethod
    def open(cls, folder: Path, *, settings: VectorSettings | None = None) -> EdgePairStore:
        """Open the store in `folder`. Other settings than before have their effect when the graph is built next.

        Raises:
            FailedPrecondition: it is open already, here or in another process.
            DataLoss: there is no store, or it is damaged.
        """
        manifest = _read_manifest(folder)
        path = folder / manifest.shard
        new_for_size = manifest.embedding_size if settings else None
        settings = settings or VectorSettings()
        shard = Shard(path, settings, new_for_size=new_for_size)
        for left in folder.glob(f"{_SHARD}*"):  # by an optimization that did not end
            if left.name != manifest.shard:
                shutil.rmtree(left, ignore_errors=True)
        return cls(folder, manifest, shard, settings)

    @property
    def embedding_size(self) -> int:
        """Size of the embeddings; 0: it holds none."""
        return self._manifest.embedding_size

    def optimize(self) -> None:
        """Build the graph in another process, and go over to it; reading and writing go on meanwhile. Blocks.

        Raises:
            OSError: the disk has no room for a second copy. RuntimeError: the other process failed. The store is as it was.
        """
        with self._optimizing:
            number = int(self._manifest.shard.removeprefix(_SHARD)) + 1
            path = self._folder / f"{_SHARD}{number}"
            shutil.rmtree(path, ignore_errors=True)
            edge_shard.check_room(self._folder / self._manifest.shard, self._settings)
            try:
                with self._writing:
                    self._copy_shard(path)
                    self._touched = set()
                edge_shard.build_apart(path, self._is_stopped)
                built = Shard(path, self._settings)
                try:
                    with self._writing:
                        touched = self._take_touched()
                    self._bring_up(built, touched)
                    with self._writing:
                        self._bring_up(built, self._take_touched())
                        self._go_over(built)
                except BaseException:
                    built.close()
                    raise
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            finally:
                self._touched = None

    def stop_building(self) -> None:
        """`optimize` gives up, now and later."""
        self._is_stopped.set()

    def snapshot(self, folder: Path) -> None:
        """Write a consistent copy into the empty `folder`, which `open` opens; writers wait meanwhile."""
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty")
        with replacing_folder(folder) as made, self._writing:
            self._copy_shard(made / self._manifest.shard)
            _write_manifest(made, self._manifest)

    def close(self) -> None:
        """Flush and let go of the files; again is no error."""
        with self._optimizing, self._writing, self._use.alone():
            if not self._is_closed:
                self._is_closed = True
                self._shard.close()

    @contextmanager
    def _points(self) -> Iterator[Shard]:
        with self._use.together():
            if self._is_closed:
                raise ValueError(f"the store in {self._folder} is closed")
            yield self._shard

    def _touch(self, points: Iterator[str]) -> None:
        if self._touched is not None:
            self._touched.update(points)

    def _copy_shard(self, path: Path) -> None:
        """Copy the shard as it is now; the caller keeps writers away."""
        with self._points() as shard:
            shard.flush()
            edge_shard.copy_folder(shard.folder, path)

    def _take_touched(self) -> list[str]:
        """What has been written since this was last asked; the caller keeps writers away, who note it as they write."""
        touched, self._touched = sorted(self._touched or ()), set()
        return touched

    def _bring_up(self, built: Shard, touched: list[str]) -> None:
        """Write into `built` what these points are now."""
        for start in range(0, len(touched), BATCH):
            points = touched[start : start + BATCH]
            with self._points() as shard:
                records = shard.retrieve(points, with_embeddings=True)
            built.write([copied(record) for record in records])
            if forgotten := set(points) - {record.point for record in records}:
                built.forget(sorted(forgotten))

    def _go_over(self, built: Shard) -> None:
        built.flush()
        manifest = replace(self._manifest, shard=built.folder.name)
        with self._use.alone():
            _write_manifest(self._folder, manifest)
            retired, self._shard, self._manifest = self._shard, built, manifest
            retired.close()
        shutil.rmtree(retired.folder, ignore_errors=True)


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    write_json(
        folder / _MANIFEST, {"format": FORMAT, "embedding_size": manifest.embedding_size, "shard": manifest.shard}
    )


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / _MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise DataLoss(f"{path}: format is {document['format']!r}, this version reads {FORMAT!r}")
        return _Manifest(embedding_size=int(document["embedding_size"]), shard=str(document["shard"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{path} cannot be read: {error}") from error
