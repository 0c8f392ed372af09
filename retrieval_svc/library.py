"""A library: the knowledge bases of one data folder, which one process has open for writing."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.corpus import Facet
from common.files import sync_folder
from common.service.errors import AlreadyExists, FailedPrecondition, NotFound
from retrieval_svc.bm25 import Bm25Process
from retrieval_svc.embedding import Embedder
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.knowledge_base_folder import Bm25, make_folder
from retrieval_svc.manifest import NAME_RULE, PAIRS, KnowledgeBaseError, Manifest, fitting_manifest
from retrieval_svc.new_pairs import UriReader
from retrieval_svc.vectors import VectorSettings

_REMOVED = ".removed-"
_LEFTOVERS = (f"{_REMOVED}*", ".*.part", ".*.old")  # of a deletion or a creation that was cut short
_LOG = logging.getLogger(__name__)


class LibraryError(ValueError):
    """The data folder is in use, or cannot be used; the message names it."""


class Library:
    """Knowledge bases by name; safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        lock: FolderLock,
        *,
        embedder: Embedder | None,
        uri_reader: UriReader | None,
        settings: VectorSettings | None = None,
        bm25: Bm25 = "tantivy",
        bm25_process: Bm25Process = "off",
    ) -> None:
        """See `open`."""
        self.folder = folder
        self._lock = lock
        self._embedder = embedder
        self._uri_reader = uri_reader
        self._settings = settings
        self._bm25: Bm25 = bm25
        self._bm25_process: Bm25Process = bm25_process
        self._changing = threading.RLock()
        self._open: Mapping[str, KnowledgeBase] = {}  # replaced, never written to
        self._damaged: Mapping[str, str] = {}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        embedder: Embedder | None = None,
        uri_reader: UriReader | None = None,
        settings: VectorSettings | None = None,
        bm25: Bm25 = "tantivy",
        bm25_process: Bm25Process = "off",
    ) -> Library:
        """Open the library in `folder`, which is made if it is not there, with all its knowledge bases.

        A knowledge base that cannot be opened does not stop the others: see `damaged`.

        Args:
            embedder, uri_reader, settings, bm25, bm25_process: see `KnowledgeBase.open`.

        Raises:
            LibraryError: another process has it open, or the folder cannot be written.
        """
        library = cls(
            folder,
            taken(folder),
            embedder=embedder,
            uri_reader=uri_reader,
            settings=settings,
            bm25=bm25,
            bm25_process=bm25_process,
        )
        library.begin()
        return library

    def begin(self) -> None:
        """Open all that is there, or close again."""
        try:
            self._clean_up()
            self._open_all()
        except BaseException:
            self.close()
            raise

    @property
    def damaged(self) -> Mapping[str, str]:
        """Knowledge bases that could not be opened, with the reason."""
        return self._damaged

    def names(self) -> list[str]:
        """Those that answer, in order."""
        return sorted(self._open)

    def get(self, name: str) -> KnowledgeBase:
        """The knowledge base of this name.

        Raises:
            NotFound: there is none.
            FailedPrecondition: it could not be opened.
        """
        found = self._open.get(name)
        if found is not None:
            return found
        if name in self._damaged:
            raise FailedPrecondition(f"knowledge base {name!r} could not be opened: {self._damaged[name]}")
        raise NotFound(f"knowledge_base: {name!r} is not one of {', '.join(self.names()) or 'them: there are none'}")

    def create(
        self,
        name: str,
        facets: Sequence[Facet] = (),
        scene_phrases: Sequence[str] = (),
        embedding_size: int | None = None,
    ) -> KnowledgeBase:
        """Make an empty knowledge base; `embedding_size` None: the embedder's, 0: it has no embeddings.

        Raises:
            InvalidArgument: a name, facet or size cannot be.
            AlreadyExists: there is one of this name.
        """
        manifest = fitting_manifest(
            name, facets=facets, scene_phrases=scene_phrases, embedding_size=embedding_size, embedder=self._embedder
        )
        with self._changing:
            made = self._make(manifest)
            self._open = {**self._open, name: made}
            return made

    def delete(self, name: str) -> None:
        """Remove a knowledge base with all that is in it, after the calls under way have ended.

        Raises:
            NotFound: there is none.
        """
        with self._changing:
            if name not in self._open and name not in self._damaged:
                self.get(name)
            found = self._open.get(name)
            self._open = {n: other for n, other in self._open.items() if n != name}
            if found is not None:
                found.close()
                self._damaged = {**self._damaged, name: "it is half deleted"}
            removed = self._take_away(name)
            self._damaged = {n: why for n, why in self._damaged.items() if n != name}
        for path in removed:
            shutil.rmtree(path, ignore_errors=True)  # what is left over goes when the library is opened next

    def close(self) -> None:
        """Close all of them, after the calls under way have ended."""
        with self._changing:
            opened, self._open = self._open, {}
            try:
                for knowledge_base in opened.values():
                    try:
                        knowledge_base.close()
                    except Exception:  # the others must be closed all the same
                        _LOG.exception("close_failed", extra={"knowledge_base": knowledge_base.name})
            finally:
                self._lock.close()

    def _make(self, manifest: Manifest) -> KnowledgeBase:
        """A new knowledge base, opened. Raises AlreadyExists."""
        folder = self.folder / manifest.name
        if folder.exists():
            raise AlreadyExists(f"knowledge_base: {manifest.name!r} exists")
        make_folder(folder, manifest, self._settings)
        return self._opened(folder)

    def _opened(self, folder: Path) -> KnowledgeBase:
        return KnowledgeBase.open(
            folder,
            embedder=self._embedder,
            uri_reader=self._uri_reader,
            settings=self._settings,
            bm25=self._bm25,
            bm25_process=self._bm25_process,
        )

    def _take_away(self, name: str) -> list[Path]:
        """Make a closed knowledge base vanish in one step; gives what is left to be removed."""
        return [moved_aside(self.folder / name)]

    def _clean_up(self) -> None:
        for pattern in _LEFTOVERS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _open_all(self) -> None:
        opened: dict[str, KnowledgeBase] = {}
        damaged: dict[str, str] = {}
        for path in sorted(self.folder.iterdir()):
            if not (path / PAIRS).is_dir() or not NAME_RULE.fullmatch(path.name):
                continue  # not ours
            try:
                opened[path.name] = self._opened(path)
                if opened[path.name].name != path.name:  # copied by hand: `restore` renames
                    other = opened.pop(path.name)
                    other.close()
                    raise KnowledgeBaseError(f"knowledge base: the manifest in {path} names {other.name!r}")
            except KnowledgeBaseError as error:
                damaged[path.name] = str(error)
                _LOG.error("knowledge_base_damaged", extra={"knowledge_base": path.name, "reason": str(error)})
            self._open, self._damaged = dict(opened), dict(damaged)


def taken(folder: Path) -> FolderLock:
    """The lock of a library's folder, which is made if it is not there.

    Raises:
        LibraryError: another process has it open, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder)
    except FolderInUse as error:
        raise LibraryError(f"library: {error}") from error
    except OSError as error:
        raise LibraryError(f"library: {folder} cannot be used ({error})") from error


def moved_aside(folder: Path) -> Path:
    """Rename a folder so that a library overlooks it, and removes it when it is opened next; gives where it is now."""
    removed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{_REMOVED}{folder.name}-"))
    os.replace(folder, removed / folder.name)
    sync_folder(folder.parent)
    return removed
