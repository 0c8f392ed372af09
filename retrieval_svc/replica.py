"""A knowledge base whose pairs are in a collection of a Qdrant server, as one of several replicas opens it.

On this replica's disk lie the manifest, Tantivy's index (a projection of the collection, which can be thrown away) and notes;
pictures lie in a folder that all replicas share.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common.files import write_atomic
from common.service.errors import ServiceError
from retrieval_svc.bm25 import Bm25Process, TantivyIndex
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.knowledge_base_folder import Bm25, Parts
from retrieval_svc.manifest import BM25, PAIRS, KnowledgeBaseError, Manifest, manifest_of, read_manifest, write_manifest
from retrieval_svc.pairs import LexicalIndex
from retrieval_svc.qdrant_connection import Connection
from retrieval_svc.replica_feed import TOMBSTONES_KEPT_NS, ChangeFeed, ReplicaProjection
from retrieval_svc.shared_images import SharedImageStore
from retrieval_svc.sparse import SparseIndex
from retrieval_svc.vectors_server import ServerPairStore

_REPLICA = "replica"  # file of a library that names this replica for good
_TRIES = 3
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A Qdrant server, and how replicas use it.

    Attributes:
        prefix: begins the names of our collections.
        poll_s: how often a replica looks for what others have written.
        images: folder of the pictures, shared by all replicas.
        bm25_process: see `TantivyIndex.open`.
    """

    connection: Connection
    prefix: str
    images: Path
    bm25: Bm25 = "tantivy"
    bm25_process: Bm25Process = "off"
    poll_s: float = 0.25

    def collection(self, name: str) -> str:
        """The collection of a knowledge base."""
        return self.prefix + name


def replica_id(folder: Path) -> str:
    """The name of the replica whose library is in `folder`, made the first time; hexadecimal.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / _REPLICA
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="ascii", errors="replace").strip()


def manifest_on(server: Server, name: str) -> Manifest:
    """What the collection of a knowledge base says of it.

    Raises:
        KnowledgeBaseError: there is none, or it is none of ours. Unavailable: the server cannot be asked.
    """
    collection = server.collection(name)
    store = ServerPairStore(server.connection.client, collection, 0, server.connection.settings)
    manifest = manifest_of(store.manifest(), f"collection {collection!r}")
    if manifest.name != name:
        raise KnowledgeBaseError(f"knowledge base: collection {collection!r} holds {manifest.name!r}")
    return manifest


def open_replica(folder: Path, manifest: Manifest, server: Server, *, replica: str) -> Parts:
    """Open this replica of a knowledge base, and bring its index up to the collection.

    Args:
        folder: on this replica's disk; what it holds of another knowledge base of this name is thrown away.
        replica: see `replica_id`.

    Raises:
        KnowledgeBaseError: it cannot be opened, or another process has the folder open.
    """
    with ExitStack() as resources:
        try:
            local = _own_folder(folder, manifest)
            resources.callback(FolderLock(folder).close)
            store = ServerPairStore.open(
                server.connection.client,
                server.collection(manifest.name),
                settings=server.connection.settings,
                embedding_size=manifest.embedding_size,
            )
            lexical: LexicalIndex = SparseIndex(store)
            feed = ChangeFeed(None, generation=store.latest_version())
            if server.bm25 == "tantivy":
                lexical = index = TantivyIndex.open(folder / BM25, process=server.bm25_process)
                resources.callback(index.close)
                feed = ChangeFeed(index)
            timeout_s = float(server.connection.settings.timeout_s)
            projection = ReplicaProjection(store, feed, poll_s=server.poll_s, write_timeout_s=timeout_s)
            resources.callback(projection.close)
            if server.bm25 == "tantivy":
                _agree(manifest.name, store, lexical, projection)
            pictures = server.images / manifest.uuid
            images = SharedImageStore(pictures, writer=replica)
            images.sweep(store.contents_in_use)
            facets = [dict([term.split("=", 1)]) for term in sorted(store.facet_terms())]
        except FolderInUse as error:
            raise KnowledgeBaseError(f"knowledge base: {error}") from error
        except KnowledgeBaseError:
            raise
        except (ServiceError, OSError, ValueError, RuntimeError) as error:  # the last two: Tantivy's
            raise KnowledgeBaseError(f"knowledge base: {folder} cannot be opened ({error})") from error
        return Parts(
            folder=folder,
            manifest=local,
            store=store,
            lexical=lexical,
            projection=projection,
            images=images,
            images_folder=pictures,
            resources=resources.pop_all(),
            feed=feed,
            facets=facets,
        )


def _own_folder(folder: Path, manifest: Manifest) -> Manifest:
    """Make `folder` this replica's of that knowledge base; gives the manifest with all facet values that it has met."""
    if (folder / PAIRS).exists():
        raise KnowledgeBaseError(f"knowledge base: {folder} holds pairs of its own; give replicas another data folder")
    try:
        local = read_manifest(folder)
        if local.uuid == manifest.uuid:
            return local
    except KnowledgeBaseError:
        pass
    if folder.exists():
        _LOG.warning("replica_begun_anew", extra={"knowledge_base": manifest.name})
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_manifest(folder, manifest)
    return manifest


def _agree(name: str, store: ServerPairStore, index: LexicalIndex, projection: ReplicaProjection) -> None:
    """Bring the index up to the store; where it may have missed a deletion, or has lost something, make it again."""
    oldest = min(store.latest_version(), time.time_ns() - TOMBSTONES_KEPT_NS)
    if 0 < index.generation < oldest:
        _LOG.warning("index_rebuilt", extra={"knowledge_base": name, "reason": "it is older than the deletions known"})
        projection.rebuild()
        return
    for _ in range(_TRIES):
        before = store.latest_version()
        projection.catch_up()
        if index.num_pairs == store.count():
            return
        if store.latest_version() == before:  # nobody writes: they should be the same
            _LOG.warning("index_rebuilt", extra={"knowledge_base": name, "reason": "the number of pairs differs"})
            projection.rebuild()
            return
