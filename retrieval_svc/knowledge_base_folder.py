"""A knowledge base on disk: how its folder is made and opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import replacing_folder
from common.service.errors import ServiceError
from retrieval_svc.bm25 import Bm25Process, TantivyIndex
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.image_store import ImageStore
from retrieval_svc.manifest import BM25, IMAGES, PAIRS, KnowledgeBaseError, Manifest, read_manifest, write_manifest
from retrieval_svc.pairs import LexicalIndex, PairStore
from retrieval_svc.projection import Projection
from retrieval_svc.replica_feed import ChangeFeed
from retrieval_svc.sparse import SparseIndex
from retrieval_svc.vectors import EdgePairStore, VectorSettings

Bm25 = Literal["tantivy", "qdrant"]  # an index on this disk, or sparse vectors in the pair store

_BLOCK_BYTES = 512  # POSIX: the unit of st_blocks
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a knowledge base is put together from.

    Attributes:
        projection: keeps `lexical` in step with `store`; None: it needs nobody, as it is the store's own.
        feed: changes that other processes make in the store; None: there are no others. With others, results are
            compared with the store before they go out.
        facets: of pairs that are there, which the manifest may not know yet.
        images_folder: where the pictures are.
        resources: lets go of all of it.
    """

    folder: Path
    manifest: Manifest
    store: PairStore
    lexical: LexicalIndex
    projection: Projection | None
    images: ImageStore
    images_folder: Path
    resources: ExitStack
    feed: ChangeFeed | None = None
    facets: Sequence[Mapping[str, str]] = ()


def make_folder(folder: Path, manifest: Manifest, settings: VectorSettings | None) -> None:
    """Make an empty knowledge base, which appears by one rename.

    Raises:
        KnowledgeBaseError: `folder` exists.
        OSError: the disk is full, or the folder cannot be written.
    """
    if folder.exists():
        raise KnowledgeBaseError(f"knowledge base: {folder} exists")
    with replacing_folder(folder) as made:
        EdgePairStore.create(made / PAIRS, embedding_size=manifest.embedding_size, settings=settings).close()
        write_manifest(made, manifest)


def open_parts(folder: Path, settings: VectorSettings | None, bm25: Bm25, bm25_process: Bm25Process = "off") -> Parts:
    """Open what is in `folder` and do first what a crash has left undone, so that both indexes agree.

    Args:
        bm25: tantivy's index is made where there is none, and left behind where it is not asked.
        bm25_process: see `TantivyIndex.open`.

    Raises:
        KnowledgeBaseError: it is missing, damaged, of another format, or another process has it open.
    """
    manifest = read_manifest(folder)
    with ExitStack() as resources:
        try:
            resources.callback(FolderLock(folder).close)
            store = EdgePairStore.open(folder / PAIRS, settings=settings)
            resources.callback(store.close)
            if store.embedding_size != manifest.embedding_size:
                raise KnowledgeBaseError(
                    f"knowledge base: {folder / PAIRS} has embeddings of size {store.embedding_size}, the manifest says"
                    f" {manifest.embedding_size}"
                )
            lexical: LexicalIndex = SparseIndex(store)
            projection = None
            if bm25 == "tantivy":
                lexical = index = TantivyIndex.open(folder / BM25, process=bm25_process)
                resources.callback(index.close)
                projection = Projection(store, index)
                resources.callback(projection.close)
                _agree(manifest.name, store, index, projection)
            images = ImageStore(folder / IMAGES)
            images.sweep(store.contents_in_use)
        except FolderInUse as error:
            raise KnowledgeBaseError(f"knowledge base: {error}") from error
        except KnowledgeBaseError:
            raise
        except (ServiceError, OSError, ValueError, RuntimeError) as error:  # the last two: Tantivy's
            raise KnowledgeBaseError(f"knowledge base: {folder} cannot be opened ({error})") from error
        return Parts(
            folder=folder,
            manifest=manifest,
            store=store,
            lexical=lexical,
            projection=projection,
            images=images,
            images_folder=folder / IMAGES,
            resources=resources.pop_all(),
        )


def _agree(name: str, store: PairStore, index: TantivyIndex, projection: Projection) -> None:
    """Bring the index up to the store; where it belongs to another one, or has lost something, make it again."""
    if index.generation <= store.latest_version():
        projection.catch_up()
        if index.num_pairs == store.count():
            return
    _LOG.warning("index_rebuilt", extra={"knowledge_base": name})
    projection.rebuild()


def num_bytes(folder: Path) -> int:
    """What all files in `folder` take up on the disk; the engine's are larger by their names than by their content.

    0 where there is no such folder.
    """
    total = 0
    if not folder.is_dir():
        return total
    for entry in os.scandir(folder):
        try:
            total += num_bytes(Path(entry.path)) if entry.is_dir() else entry.stat().st_blocks * _BLOCK_BYTES
        except FileNotFoundError:
            continue  # merged away meanwhile
    return total
