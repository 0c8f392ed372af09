"""BM25 over entity text, with Tantivy: the only file that knows it.

A document is one pair. Words count in full where they are spelled as asked and for less where only their stem
agrees, so that stemming finds "guide dogs" without mistaking "universal" for "university". A pair whose whole
name is asked for stands before those that merely contain it. Equal scores are ordered by how many of the
asked facets a pair has, then by a hash of its id: deterministic, and kind to no style.

The index is a projection of a pair store: `apply` writes the store's changes into it and keeps, beside it, the
version of the last one. What is lost between the two is written again, which changes nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import tantivy

from retrieval_svc.bm25_files import Cursor, check_files, move_aside, read_cursor, system_error, write_cursor
from retrieval_svc.pairs import Change, Lookup, PairFilter, Scored, StoredPair, point_of
from retrieval_svc.words import (
    STEM_WEIGHT,
    STEMS,
    WORD_WEIGHT,
    WORDS,
    name_key,
    plain,
    tie_of,
    weighted_words,
)

_WRITER_BYTES = 64 << 20
_TIE_BITS = 64
_SCORE_DECIMALS = 4
_SAME_SCORE = 5e-5  # Tantivy adds up the words of a document in no fixed order: equal scores differ in their last bits
_TIE_WINDOW = 8  # a tie is read whole up to so many times the limit; a longer one is thinned out by its hash
_THINNING = 2  # bits of the hash: each level of thinning keeps a quarter
_NUM_LEVELS = 12
_NOTHING = {"caption": "", "entity": ""}  # fields without a default; empty ones are not stored

_RAW_FIELDS = ("point", "name", "facet", "license", "source", "safe", "content", "epoch", "level")

_Clauses = list[tuple[tantivy.Occur, tantivy.Query]]
_Hit = tuple[float, tantivy.DocAddress]
_Place = tuple[int, int]  # of a document: what an address does not do, compare


@dataclass(frozen=True, kw_only=True)
class _View:
    """What searches see: one commit."""

    searcher: tantivy.Searcher
    generation: int


class TantivyIndex:
    """A `LexicalIndex` on disk. Any number of threads search while one applies changes."""

    def __init__(self, folder: Path, index: tantivy.Index, cursor: Cursor) -> None:
        """See `open`."""
        self._folder = folder
        self._index = index
        self._epoch = cursor.epoch
        self._writing = threading.Lock()
        self._writer: tantivy.IndexWriter | None = None
        self._view = _View(searcher=index.searcher(), generation=cursor.generation)

    @classmethod
    def open(cls, folder: Path) -> TantivyIndex:
        """Open the index in `folder`, or begin an empty one there; a damaged one is moved to `folder`.damaged.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            opened = cls(folder, _open(folder), read_cursor(folder))
        except (ValueError, OSError, KeyError, TypeError):
            if folder.exists():
                move_aside(folder)
            opened = cls(folder, _open(folder), Cursor())
        if opened.generation == 0 and opened.num_pairs:
            opened.rebuild(())  # killed before the first cursor was written: what is there may be out of date
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
        with _panics_as_errors():
            return _Search(self._view.searcher, self._index.schema, lookup).run()

    def exact(self, entity: str, facets: Mapping[str, str]) -> list[StoredPair]:
        """All pairs of this very entity (by `name_key`) that have all of these facets, by id."""
        view, key = self._view, name_key(entity)
        limit = view.searcher.doc_freq("name", key) if key else 0
        if not limit:
            return []
        wanted = [_term(self._index.schema, "name", key)]
        wanted += [_term(self._index.schema, "facet", _facet(*item)) for item in facets.items()]
        query = tantivy.Query.boolean_query([(tantivy.Occur.Must, clause) for clause in wanted])
        hits = view.searcher.search(query, limit, count=False).hits
        return sorted((_load(view.searcher, address) for _, address in hits), key=lambda pair: pair.pair_id)

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
            everything, current = tantivy.Query.all_query(), _term(self._index.schema, "epoch", str(epoch))
            old = [(tantivy.Occur.Must, everything), (tantivy.Occur.MustNot, current)]
            writer.delete_documents_by_query(tantivy.Query.boolean_query(old))
            writer.commit()
            self._epoch = epoch
            self._show(last)

    def close(self) -> None:
        """Let go of the files; waits for merges that are under way."""
        with self._writing:
            self._drop_writer()

    def _show(self, generation: int) -> None:
        self._index.reload()
        self._view = _View(searcher=self._index.searcher(), generation=generation)
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


class _Search:
    """One lookup in one view."""

    def __init__(self, searcher: tantivy.Searcher, schema: tantivy.Schema, lookup: Lookup) -> None:
        self._searcher = searcher
        self._schema = schema
        self._lookup = lookup
        self._filter = _filter_clauses(schema, lookup.filter)

    def run(self) -> list[Scored]:
        """The best pairs, tier by tier."""
        lookup = self._lookup
        scoring = _scoring(self._schema, lookup)
        if scoring is None or lookup.limit < 1:
            return []
        keys = dict.fromkeys((name_key(" ".join((lookup.entity, *lookup.details))), name_key(lookup.entity)))
        known = [key for key in keys if self._searcher.doc_freq("name", key)]
        found: list[Scored] = []
        given: set[_Place] = set()
        for tier in (*([_selecting(_term(self._schema, "name", key))] for key in known), []):
            clauses: _Clauses = [(tantivy.Occur.Must, scoring), *tier, *self._filter]
            found += self._best(clauses, lookup.limit - len(found), given)
            if len(found) == lookup.limit:
                break
        return found

    def _best(self, clauses: _Clauses, limit: int, given: set[_Place]) -> list[Scored]:
        """At most `limit` matches by score, ties by facets and hash; adds them to `given`, and gives none of those."""
        hits = self._hits(clauses, limit + len(given) + 1, given)
        if len(hits) > limit and _tied(hits[limit], hits[limit - 1]):
            above = [hit for hit in hits if not _tied(hit, hits[limit])]
            hits = above + self._tie(clauses, hits[limit], limit - len(above), given)
        given.update(_place(hit) for hit in hits[:limit])
        return self._in_order(hits[:limit])

    def _tie(self, clauses: _Clauses, head: _Hit, limit: int, given: set[_Place]) -> list[_Hit]:
        """The first `limit` of the matches that tie with `head`, those that agree with more facets before others."""
        facets = [_term(self._schema, "facet", _facet(*item)) for item in self._lookup.facets.items()]
        chosen: list[_Hit] = []
        for num_agreeing in range(len(facets), -1, -1):
            more = [(tantivy.Occur.Should, facet) for facet in facets]
            agreeing = tantivy.Query.boolean_query(more, minimum_number_should_match=num_agreeing)
            narrowed = [*clauses, *([_selecting(agreeing)] if num_agreeing else [])]
            taken = given | {_place(hit) for hit in chosen}
            chosen += self._thinned(narrowed, head, limit - len(chosen), taken)
            if len(chosen) == limit:
                break
        return chosen

    def _thinned(self, clauses: _Clauses, head: _Hit, limit: int, given: set[_Place]) -> list[_Hit]:
        """The first `limit` by hash of the matches that tie with `head`, without reading a long tie to its end.

        Where the tie does not fit into the window, only documents whose hash is small enough are asked for: they
        are the first of it.
        """
        window = _TIE_WINDOW * self._lookup.limit
        found: dict[_Place, _Hit] = {}
        for level in range(_NUM_LEVELS + 1):
            thin = [_selecting(_term(self._schema, "level", str(level)))] if level else []
            hits = self._hits([*clauses, *thin], window + len(given), given)
            tied = {_place(hit): hit for hit in hits if _tied(hit, head)}
            # Thinned out too far (very unlikely): what the level before has shown fills up.
            found = tied if len(tied) >= limit or not level else {**found, **tied}
            if len(hits) < window or hits[-1][0] < head[0] - _SAME_SCORE:
                break  # the tie is whole
        hits = list(found.values())
        ties = self._searcher.fast_field_values("tie", [address for _, address in hits])
        order = sorted(range(len(hits)), key=lambda position: int(ties[position] or 0))
        return [hits[position] for position in order[:limit]]

    def _hits(self, clauses: _Clauses, limit: int, given: set[_Place]) -> list[_Hit]:
        """At most `limit` matches by score, less those in `given`."""
        # A lone clause is asked as it is: Tantivy then skips documents that cannot be among the best.
        query = clauses[0][1] if len(clauses) == 1 else tantivy.Query.boolean_query(clauses)
        hits = self._searcher.search(query, limit, count=False).hits
        return [hit for hit in hits if _place(hit) not in given] if given else hits

    def _in_order(self, hits: Sequence[_Hit]) -> list[Scored]:
        """The pairs of `hits`, which are by score, ordered within equal scores."""
        wanted = self._lookup.facets.items()
        keyed: list[tuple[float, int, int, StoredPair]] = []
        head: _Hit | None = None
        for hit in hits:
            head = hit if head is None or not _tied(hit, head) else head
            pair = _load(self._searcher, hit[1])
            num_agreeing = sum(pair.facets.get(name) == value for name, value in wanted)
            keyed.append((-head[0], -num_agreeing, tie_of(pair.pair_id), pair))
        keyed.sort(key=lambda item: item[:3])
        return [Scored(pair=pair, score=round(-score, _SCORE_DECIMALS)) for score, _, _, pair in keyed]


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic in Rust is no `Exception` in Python, and would end threads that survive any other failure."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(f"bm25: {error}") from error
        raise


def _scoring(schema: tantivy.Schema, lookup: Lookup) -> tantivy.Query | None:
    """The words of the lookup as plain terms, none of them query syntax; None: there are no words.

    A document that has the word has its stem, too: the two weights add up to 1. A flat sum of terms is what lets
    Tantivy skip whole blocks of documents.
    """
    clauses: _Clauses = []
    for (word, stem), weight in weighted_words(lookup).items():
        for field, text, part in (("words", word, WORD_WEIGHT), ("stems", stem, STEM_WEIGHT)):
            boosted = tantivy.Query.boost_query(_term(schema, field, text), weight * part)
            clauses.append((tantivy.Occur.Should, boosted))
    return tantivy.Query.boolean_query(clauses) if clauses else None


def _filter_clauses(schema: tantivy.Schema, wanted: PairFilter) -> _Clauses:
    def any_of(field: str, values: Iterable[str]) -> tantivy.Query:
        return tantivy.Query.term_set_query(schema, field, sorted(values))

    groups = [("facet", [_facet(name, value) for value in values]) for name, values in wanted.facets.items()]
    groups += [("license", list(wanted.licenses)), ("source", list(wanted.sources))]
    groups += [("safe", [_flag(wanted.safe)])] if wanted.safe is not None else []
    excluded = (
        ("point", [point_of(pair_id) for pair_id in wanted.excluded_pair_ids]),
        ("content", list(wanted.excluded_contents)),
        ("name", list(wanted.excluded_names)),
    )
    clauses = [_selecting(any_of(field, values)) for field, values in groups if values]
    return clauses + [(tantivy.Occur.MustNot, any_of(field, values)) for field, values in excluded if values]


def _document(point: str, pair: StoredPair, epoch: int) -> tantivy.Document:
    document, tie = tantivy.Document(), tie_of(pair.pair_id)
    document.add_text("point", point)
    document.add_text("name", name_key(pair.entity))
    for field in ("words", "stems"):
        document.add_text(field, plain(pair.entity))
    for item in pair.facets.items():
        document.add_text("facet", _facet(*item))
    for field, value in (("license", pair.license), ("source", pair.source), ("content", pair.content)):
        document.add_text(field, value)
    document.add_text("safe", _flag(pair.safe))
    document.add_text("epoch", str(epoch))
    level = 1
    while level <= _NUM_LEVELS and tie >> (_TIE_BITS - _THINNING * level) == 0:
        document.add_text("level", str(level))
        level += 1
    document.add_unsigned("tie", tie)  # `Document(tie=7)` would make a signed integer, and that kills the writer
    fields = {**vars(pair), "facets": dict(pair.facets), "attributes": dict(pair.attributes)}
    stored = json.dumps({name: value for name, value in fields.items() if value}, ensure_ascii=False)
    document.add_bytes("payload", stored.encode())
    return document


def _load(searcher: tantivy.Searcher, address: tantivy.DocAddress) -> StoredPair:
    (stored,) = searcher.doc(address)["payload"]
    return StoredPair(**{**_NOTHING, **json.loads(bytes(stored).decode())})


def _open(folder: Path) -> tantivy.Index:
    folder.mkdir(parents=True, exist_ok=True)
    check_files(folder)
    index = tantivy.Index(_schema(), path=str(folder))
    index.register_tokenizer("reimagen_words", WORDS)
    index.register_tokenizer("reimagen_stems", STEMS)
    index.config_reader(reload_policy="manual")  # a view is changed by `apply` alone, as a whole
    return index


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for field in _RAW_FIELDS:
        builder.add_text_field(field, tokenizer_name="raw", index_option="basic")
    for field in ("words", "stems"):
        builder.add_text_field(field, tokenizer_name=f"reimagen_{field}", index_option="freq")
    builder.add_unsigned_field("tie", fast=True)
    return builder.add_bytes_field("payload", stored=True).build()


def _term(schema: tantivy.Schema, field: str, text: str) -> tantivy.Query:
    return tantivy.Query.term_query(schema, field, text, index_option="basic" if field in _RAW_FIELDS else "freq")


def _selecting(query: tantivy.Query) -> tuple[tantivy.Occur, tantivy.Query]:
    """A clause that selects and adds nothing to the score."""
    return tantivy.Occur.Must, tantivy.Query.const_score_query(query, 0.0)


def _tied(one: _Hit, other: _Hit) -> bool:
    return abs(one[0] - other[0]) <= _SAME_SCORE


def _place(hit: _Hit) -> _Place:
    return hit[1].segment_ord, hit[1].doc


def _facet(name: str, value: str) -> str:
    return f"{name}={value}"


def _flag(value: bool) -> str:
    return "1" if value else "0"
