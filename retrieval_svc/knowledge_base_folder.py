"""A knowledge base on disk: how its folder is made and opened."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common.files import replacing_folder
from common.service.errors import ServiceError
from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.image_store import ImageStore
from retrieval_svc.manifest import BM25, IMAGES, PAIRS, KnowledgeBaseError, Manifest, read_manifest, write_manifest
from retrieval_svc.pairs import LexicalIndex, PairStore
from retrieval_svc.projection import Projection
from retrieval_svc.vectors import EdgePairStore, VectorSettings

_BLOCK_BYTES = 512  # POSIX: the unit of st_blocks
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a knowledge base is put together from.

    Attributes:
        projection: keeps `lexical` in step with `store`; None: it needs nobody, as it is the store's own.
        has_other_writers: other processes write to the store; results are compared with it before they go out.
        resources: lets go of all of it.
    """

    folder: Path
    manifest: Manifest
    store: PairStore
    lexical: LexicalIndex
    projection: Projection | None
    images: ImageStore
    resources: ExitStack
    has_other_writers: bool = False


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


def open_parts(folder: Path, settings: VectorSettings | None) -> Parts:
    """Open what is in `folder` and do first what a crash has left undone, so that both indexes agree.

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
            index = TantivyIndex.open(folder / BM25)
            resources.callback(index.close)
            projection = Projection(store, index)
            resources.callback(projection.close)
            _agree(manifest.name, store, index, projection)
            images = ImageStore(folder / IMAGES)
            images.sweep(store.contents_in_use)
        except FolderInUse as error:
            raise KnowledgeBaseError(f"knowledge base: {error}") from error
        except (ServiceError, OSError) as error:
            raise KnowledgeBaseError(f"knowledge base: {folder} cannot be opened ({error})") from error
        return Parts(
            folder=folder,
            manifest=manifest,
            store=store,
            lexical=index,
            projection=projection,
            images=images,
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
    """What all files in `folder` take up on the disk; the engine's are larger by their names than by their content."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += num_bytes(Path(entry.path)) if entry.is_dir() else entry.stat().st_blocks * _BLOCK_BYTES
        except FileNotFoundError:
            continue  # merged away meanwhile
    return total
