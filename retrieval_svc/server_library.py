"""A library on a Qdrant server, which several replicas have open at once: what one makes or deletes, the others follow."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from common.service.errors import AlreadyExists, NotFound, ServiceError, Unavailable
from retrieval_svc.embedding import Embedder
from retrieval_svc.folder_lock import FolderLock
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library, LibraryError, moved_aside, taken
from retrieval_svc.manifest import NAME_RULE, PAIRS, KnowledgeBaseError, Manifest, document_of
from retrieval_svc.new_pairs import UriReader
from retrieval_svc.replica import Server, manifest_on, open_replica, replica_id
from retrieval_svc.vectors_server import ServerPairStore

FOLLOW_S = 0.5  # how often it looks which knowledge bases there are
_LOG = logging.getLogger(__name__)


class ServerLibrary(Library):
    """The knowledge bases of a server, each a collection; see `Library`."""

    def __init__(
        self,
        folder: Path,
        lock: FolderLock,
        server: Server,
        *,
        replica: str,
        embedder: Embedder | None,
        uri_reader: UriReader | None,
    ) -> None:
        """See `open_on`."""
        super().__init__(folder, lock, embedder=embedder, uri_reader=uri_reader)
        self._server = server
        self._replica = replica
        self._closing = threading.Event()
        self._following = threading.Thread(target=self._follow, name="library", daemon=True)

    @classmethod
    def open_on(
        cls, folder: Path, server: Server, *, embedder: Embedder | None = None, uri_reader: UriReader | None = None
    ) -> ServerLibrary:
        """Open the library of `server`, with what this replica keeps of it in `folder`.

        A knowledge base that cannot be opened does not stop the others: see `damaged`.

        Raises:
            LibraryError: another process has the folder open, it cannot be written or holds knowledge bases of its own; or the
                server cannot be used.
        """
        lock = taken(folder)
        try:
            embedded = [path.name for path in folder.iterdir() if (path / PAIRS).is_dir()]
            if embedded:
                raise LibraryError(f"library: {folder} holds {embedded[0]!r} with its pairs: give another data folder")
            replica = replica_id(folder)
        except BaseException:
            lock.close()
            raise
        library = cls(folder, lock, server, replica=replica, embedder=embedder, uri_reader=uri_reader)
        library.begin()
        library._following.start()
        return library

    def close(self) -> None:
        """Close all of them, after the calls under way have ended."""
        self._closing.set()
        if self._following.is_alive():
            self._following.join()
        super().close()

    def _make(self, manifest: Manifest) -> KnowledgeBase:
        name = manifest.name
        if name in self._on_server():
            raise AlreadyExists(f"knowledge_base: {name!r} exists")
        ServerPairStore.create(
            self._server.connection.client,
            self._server.collection(name),
            embedding_size=manifest.embedding_size,
            settings=self._server.connection.settings,
            manifest=document_of(manifest),
        )
        try:
            return self._replica_of(manifest)
        except KnowledgeBaseError as error:
            raise Unavailable(f"knowledge base {name!r} is made, but could not be opened here: {error}") from error

    def _take_away(self, name: str) -> list[Path]:
        """The collection first: without it the other replicas let go as well."""
        pictures: list[Path] = []
        try:
            folder = self._server.images / manifest_on(self._server, name).uuid
            pictures = [folder] if folder.is_dir() else []
        except KnowledgeBaseError:
            pass  # damaged: nothing says where its pictures are
        self._server.connection.drop(self._server.collection(name))
        return [*pictures, *self._let_go_of(name)]

    def _let_go_of(self, name: str) -> list[Path]:
        return [moved_aside(self.folder / name)] if (self.folder / name).exists() else []

    def _open_all(self) -> None:
        try:
            self._take_up()
        except ServiceError as error:
            raise LibraryError(f"library: {error}") from error

    def _follow(self) -> None:
        while not self._closing.wait(FOLLOW_S):
            try:
                self._take_up()
            except Exception as error:  # the server is away: what is open answers as it can
                _LOG.warning("library_not_followed", extra={"reason": str(error)})

    def _take_up(self) -> None:
        """Open what others have made, close what they have deleted."""
        with self._changing:
            there = self._on_server()
            for name in [*self._open, *self._damaged]:
                if name not in there:
                    self._close_one(name)
            for name in there:
                self._take_up_one(name)

    def _on_server(self) -> list[str]:
        prefix = self._server.prefix
        ours = (name for name in self._server.connection.collections() if name.startswith(prefix))
        return sorted(name for name in (name.removeprefix(prefix) for name in ours) if NAME_RULE.fullmatch(name))

    def _take_up_one(self, name: str) -> None:
        try:
            manifest = manifest_on(self._server, name)
            found = self._open.get(name)
            if found is not None and found.manifest.uuid != manifest.uuid:
                self._close_one(name)  # deleted and made again
                found = None
            if found is None:
                made = self._replica_of(manifest)
                self._open = {**self._open, name: made}
                self._damaged = {n: why for n, why in self._damaged.items() if n != name}
        except NotFound:
            return  # deleted a moment ago
        except KnowledgeBaseError as error:
            if self._damaged.get(name) != str(error):
                _LOG.error("knowledge_base_damaged", extra={"knowledge_base": name, "reason": str(error)})
            self._damaged = {**self._damaged, name: str(error)}

    def _close_one(self, name: str) -> None:
        found = self._open.get(name)
        self._open = {n: other for n, other in self._open.items() if n != name}
        self._damaged = {n: why for n, why in self._damaged.items() if n != name}
        if found is not None:
            found.close()
        for path in self._let_go_of(name):
            shutil.rmtree(path, ignore_errors=True)

    def _replica_of(self, manifest: Manifest) -> KnowledgeBase:
        parts = open_replica(self.folder / manifest.name, manifest, self._server, replica=self._replica)
        return KnowledgeBase(parts, embedder=self._embedder, uri_reader=self._uri_reader)
