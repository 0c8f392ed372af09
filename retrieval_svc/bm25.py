"""BM25 over entity text, with Tantivy: how the index is kept. How it is asked: `bm25_search.py`.

A document is one pair. Words count in full where they are spelled as asked and for less where only their stem
agrees, so that stemming finds "guide dogs" without mistaking "universal" for "university". A pair whose whole
name is asked for stands before those that merely contain it. Equal scores are ordered by how many of the
asked facets a pair has, then by a hash of its id: deterministic, and kind to no style.

The index is a projection of a pair store: `apply` writes the store's changes into it and keeps, beside it, the
version of the last one. What is lost between the two is written again, which changes nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tantivy

from retrieval_svc.bm25_files import Cursor, check_files, move_aside, read_cursor, system_error, write_cursor
from retrieval_svc.bm25_search import (
    NUM_LEVELS,
    THINNING,
    LexicalSearch,
    attached,
    facet_term,
    flag,
    load,
    pair_bytes,
    term,
)
from retrieval_svc.lexical_process import LexicalProcess
from retrieval_svc.pairs import Change, Lookup, Scored, StoredPair
from retrieval_svc.words import name_key, plain, tie_of

Bm25Process = Literal["auto", "on", "off"]  # whether lookups are answered by a process of their own
AUTO_PROCESS_PAIRS = 50_000  # from so many on a lookup costs more than asking another process does

_WRITER_BYTES = 64 << 20
_TIE_BITS = 64


@dataclass(frozen=True, kw_only=True)
class _View:
    """What searches see: one commit."""

    searcher: tantivy.Searcher
    generation: int


class TantivyIndex:
    """A `LexicalIndex` on disk. Any number of threads search while one applies changes."""

    def __init__(self, folder: Path, index: tantivy.Index, cursor: Cursor, *, process: Bm25Process = "off") -> None:
        """See `open`."""
        self._folder = folder
        self._index = index
        self._epoch = cursor.epoch
        self._writing = threading.Lock()
        self._writer: tantivy.IndexWriter | None = None
        self._view = _View(searcher=index.searcher(), generation=cursor.generation)
        self._process_wanted: Bm25Process = process
        self._process: LexicalProcess | None = None

    @classmethod
    def open(cls, folder: Path, *, process: Bm25Process = "off") -> TantivyIndex:
        """Open the index in `folder`, or begin an empty one there; a damaged one is moved to `folder`.damaged.

        Args:
            process: whether a process of its own answers lookups; auto: where there are two cores, and from
                AUTO_PROCESS_PAIRS on. Until it is ready, and whenever it fails, they are answered here.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            opened = cls(folder, _open(folder), read_cursor(folder), process=process)
        except (ValueError, OSError, KeyError, TypeError):
            if folder.exists():
                move_aside(folder)
            opened = cls(folder, _open(folder), Cursor(), process=process)
        if opened.generation == 0 and opened.num_pairs:
            opened.rebuild(())  # killed before the first cursor was written: what is there may be out of date
        opened.start_process_if_due()
        return opened

    @property
    def num_pairs(self) -> int:
        """How many pairs it sees."""
        return self._view.searcher.num_docs

    @property
    def generation(self) -> int:
        """Version of the newest change it sees."""
        return self._view.generation

    def search(self, lookup: Lookup) -> list[Scored]:
        """At most `limit` pairs, best first: the whole name, then the name without details, then the others."""
        found = self._process.search(lookup) if self._process else None
        if found is not None:
            return found
        with _panics_as_errors():
            return LexicalSearch(self._view.searcher, self._index.schema, lookup).run()

    def exact(self, entity: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs of this very entity (by `name_key`) that have all of these facets, by id."""
        view, key = self._view, name_key(entity)
        limit = view.searcher.doc_freq("name", key) if key else 0
        if not limit:
            return []
        wanted = [term(self._index.schema, "name", key)]
        wanted += [term(self._index.schema, "facet", facet_term(*item)) for item in facets.items()]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Must, clause) for clause in wanted])
        hits = view.searcher.search(query, limit, count=False).hits
        return sorted((load(view.searcher, address) for _, address in hits), key=lambda pair: pair.pair_id)

    def apply(self, changes: Sequence[Change]) -> None:
        """Take the changes in, oldest first: one commit, seen by searches as a whole, durable on return.

        Raises:
            OSError: the disk is full or fails; nothing of it is seen then, and it can be tried again.
        """
        if not changes:
            return
        with self._writing, self._written() as writer:
            self._add(writer, changes, self._epoch)
            writer.commit()
            self._show(max(self.generation, changes[-1].version))

    def rebuild(self, batches: Iterable[Sequence[Change]]) -> None:
        """Take in all that the store holds, from its beginning; afterwards nothing else is in the index.

        Searches go on meanwhile, and find what they found before. Cut short, it leaves the old generation.

        Raises:
            OSError: the disk is full or fails; to be begun again.
        """
        with self._writing, self._written() as writer:
            epoch, last = time.time_ns(), 0
            for changes in batches:
                self._add(writer, changes, epoch)
                writer.commit()
                last = changes[-1].version if changes else last
            everything, current = tantivy.Query.all_query(), term(self._index.schema, "epoch", str(epoch))
            old = [(tantivy.Occur.Must, everything), (tantivy.Occur.MustNot, current)]
            writer.delete_documents_by_query(tantivy.Query.boolean_query(old))
            writer.commit()
            self._epoch = epoch
            self._show(last)

    def close(self) -> None:
        """Let go of the files; waits for merges that are under way."""
        with self._writing:
            if self._process:
                self._process.close()
            self._drop_writer()

    def start_process_if_due(self) -> None:
        """Start the process that answers lookups, if there is none and there should be."""
        wanted = self._process_wanted
        if wanted == "auto":
            num_cores = len(os.sched_getaffinity(0))
            wanted = "on" if num_cores > 1 and self.num_pairs >= AUTO_PROCESS_PAIRS else "off"
        if wanted == "on" and self._process is None:
            self._process = LexicalProcess(self._folder)

    def _show(self, generation: int) -> None:
        self._index.reload()
        if self._process:  # before the generation moves: a caller relies on searches that see it
            self._process.show_newest()
        self._view = _View(searcher=self._index.searcher(), generation=generation)
        self.start_process_if_due()
        write_cursor(self._folder, Cursor(generation=generation, epoch=self._epoch))

    def _add(self, writer: tantivy.IndexWriter, changes: Sequence[Change], epoch: int) -> None:
        newest = {change.point: change for change in changes}
        for change in newest.values():
            writer.delete_documents_by_term("point", change.point)
            if change.pair is not None:
                writer.add_document(_document(change.point, change.pair, epoch))

    @contextmanager
    def _written(self) -> Iterator[tantivy.IndexWriter]:
        """The writer; after an error a new one is made, since Tantivy's may have been killed by it."""
        if self._writer is None:
            # One thread: commits are small, and the machine has searches to answer.
            self._writer = self._index.writer(heap_size=_WRITER_BYTES, num_threads=1)
            # A process killed while it committed has left files that bear the names of those that come next.
            self._writer.garbage_collect_files()
        try:
            with _panics_as_errors():
                yield self._writer
        except BaseException as error:
            number = system_error(error, self._writer.commit)
            with suppress(ValueError):
                self._writer.rollback()
            self._drop_writer()
            if number:
                raise OSError(number, os.strerror(number)) from error
            raise

    def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(ValueError):
                writer.wait_merging_threads()  # gives the folder's lock back, too


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic in Rust is no `Exception` in Python, and would end threads that survive any other failure."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"bm25: {error}") from error
        raise


def _document(point: str, pair: StoredPair, epoch: int) -> tantivy.Document:
    document, tie = tantivy.Document(), tie_of(pair.pair_id)
    document.add_text("point", point)
    document.add_text("name", name_key(pair.entity))
    for field in ("words", "stems"):
        document.add_text(field, plain(pair.entity))
    for item in pair.facets.items():
        document.add_text("facet", facet_term(*item))
    for field, value in (("license", pair.license), ("source", pair.source), ("content", pair.content)):
        document.add_text(field, value)
    document.add_text("safe", flag(pair.safe))
    document.add_text("epoch", str(epoch))
    level = 1
    while level <= NUM_LEVELS and tie >> (_TIE_BITS - THINNING * level) == 0:
        document.add_text("level", str(level))
        level += 1
    document.add_unsigned("tie", tie)  # `Document(tie=7)` would make a signed integer, and that kills the writer
    document.add_bytes("payload", pair_bytes(pair))
    return document


def _open(folder: Path) -> tantivy.Index:
    folder.mkdir(parents=True, exist_ok=True)
    check_files(folder)
    return attached(folder)
