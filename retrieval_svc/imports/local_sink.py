"""An import into a library on this machine, which no other process has open."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_svc.imports.records import Source
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair, Upserted


class LocalSink:
    """A knowledge base of a library that this process has opened; made if it is not there."""

    max_pairs = 1024
    max_bytes = 32 << 20

    def __init__(self, library: Library, name: str, source: Source) -> None:
        """Open or make the knowledge base.

        Raises:
            ServiceError: the name or the vocabulary cannot be.
        """
        self._knowledge_base = open_or_create(library, name, source)

    @property
    def identity(self) -> str:
        return self._knowledge_base.manifest.uuid

    def upsert(self, pairs: Sequence[NewPair]) -> list[Upserted]:
        return self._knowledge_base.upsert(pairs)[0]

    def finish(self) -> None:
        self._knowledge_base.catch_up()
        self._knowledge_base.build_if_due()


def open_or_create(library: Library, name: str, source: Source) -> KnowledgeBase:
    """The knowledge base `name`, made with the vocabulary of `source` if it is not there."""
    if name not in library.names():
        library.create(name, facets=source.facets, scene_phrases=source.scene_phrases)
    return library.get(name)
