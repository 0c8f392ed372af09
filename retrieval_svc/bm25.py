"""BM25 over entity text, with Tantivy: the only file that knows it.

A document is one pair. Words count in full where they are spelled as asked and for less where only their stem
agrees, so that stemming finds "guide dogs" without mistaking "universal" for "university". A pair whose whole
name is asked for stands before those that merely contain it. Equal scores are ordered by how many of the
asked facets a pair has, then by a hash of its id: deterministic, and kind to no style.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import tantivy

from retrieval_svc.query import without_article

STEM_WEIGHT = 0.7  # of a word that agrees in its stem only
DETAIL_WEIGHT = 0.3  # of a word that stands beside the entity ("wearing a hat")

_WRITER_BYTES = 64 << 20
_LOCK_SUFFIX = ".lock"
_FIRST_PAGE = 64
_PAGE_GROWTH = 4
_SCORE_DECIMALS = 4
_NO_VALUE = 0  # the code of a facet that a pair, or a prompt, does not name
_U64_BYTES = 8
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_WITHOUT_APOSTROPHES = str.maketrans("", "", "'`\u00b4\u2018\u2019\u02bc")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One pair: `text` is what BM25 sees, `content` the picture's sha256, `payload` what a hit gives back."""

    pair_id: str
    text: str
    facets: Mapping[str, str]
    content: bytes
    payload: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What to search for. `exclude_exact` leaves out pairs of this very entity with exactly these facets."""

    entity: str
    details: tuple[str, ...]
    facets: Mapping[str, str]
    k: int
    excluded_pair_ids: frozenset[str]
    exclude_exact: bool


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A pair found: what was stored with it, and its BM25 score."""

    payload: Mapping[str, Any]
    score: float


@dataclass(frozen=True, kw_only=True)
class Hits:
    """At most k hits, best first; how many candidates before the last were left out, and why."""

    hits: tuple[Hit, ...]
    num_excluded: int
    num_duplicates: int


class FacetCodes:
    """Numbers for facet values, from the closed vocabulary; one column of the index for each facet."""

    def __init__(self, values: Mapping[str, Sequence[str]]) -> None:
        self.columns = {name: f"facet_{position}" for position, name in enumerate(values)}
        self._codes = {name: {value: i + 1 for i, value in enumerate(known)} for name, known in values.items()}

    def encode(self, facets: Mapping[str, str]) -> dict[str, int]:
        """Column to code. Raises KeyError with (name, value) for a value outside the vocabulary."""
        encoded = dict.fromkeys(self.columns.values(), _NO_VALUE)
        for name, value in facets.items():
            if name not in self._codes or value not in self._codes[name]:
                raise KeyError((name, value))
            encoded[self.columns[name]] = self._codes[name][value]
        return encoded


class Bm25Writer:
    """Writes an index into an empty folder; it is complete when the `with` block has ended well.

    A full disk is an OSError, in `add` or at the end of the block.
    """

    def __init__(self, folder: Path, codes: FacetCodes) -> None:
        self._folder = folder
        self._codes = codes
        self._index = _with_tokenizers(tantivy.Index(_schema(codes), path=str(folder)))
        # One thread: the index is small, and the machine has other things to do.
        self._writer = self._index.writer(heap_size=_WRITER_BYTES, num_threads=1)

    def __enter__(self) -> Bm25Writer:
        return self

    def add(self, entry: Entry) -> None:
        """Add one pair. Raises KeyError with (name, value) for a facet value outside the vocabulary."""
        document = tantivy.Document()
        document.add_text("pair_id", entry.pair_id)
        document.add_text("name", name_key(entry.text))
        for field in ("words", "stems"):
            document.add_text(field, _plain(entry.text))
        # `Document(tie=7)` would make a signed integer, and that kills the writer.
        document.add_unsigned("tie", _u64(hashlib.sha256(entry.pair_id.encode()).digest()))
        document.add_unsigned("content", _u64(entry.content))
        for column, code in self._codes.encode(entry.facets).items():
            document.add_unsigned(column, code)
        document.add_bytes("payload", json.dumps(dict(entry.payload), ensure_ascii=False).encode())
        try:
            self._writer.add_document(document)
        except ValueError:
            self._commit()  # a writer that was killed by a full disk tells so only here
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            # Tantivy's threads must have ended before the folder is taken away or given to others.
            with suppress(ValueError):
                self._writer.wait_merging_threads()
        if kind is not None:
            return
        for path in self._folder.iterdir():
            if path.name.endswith(_LOCK_SUFFIX):
                path.unlink()
            else:
                path.chmod(0o644)  # Tantivy makes its metadata private, but whoever serves may be another user

    def _commit(self) -> None:
        try:
            self._writer.commit()
        except ValueError as error:
            # Tantivy reports a failed write as a ValueError that holds the number of the system's error.
            number = _OS_ERROR.search(str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


class Bm25Index:
    """An index on disk, opened for searching; safe to use from several threads."""

    def __init__(self, folder: Path, codes: FacetCodes) -> None:
        """Open the index in `folder` (memory-mapped: milliseconds, whatever its size).

        Raises:
            OSError, ValueError: there is no index, or it is damaged.
        """
        self._codes = codes
        # To open, Tantivy writes a lock file beside the index (quickwit-oss/tantivy issue 557), which a
        # read-only volume refuses: it opens links instead, and needs them no longer once every file is
        # mapped.
        with tempfile.TemporaryDirectory(prefix="reimagen-bm25-", ignore_cleanup_errors=True) as links:
            for path in folder.iterdir():
                Path(links, path.name).symlink_to(path.resolve())
            index = _with_tokenizers(tantivy.Index.open(links))
            index.config_reader(reload_policy="manual")  # an index is replaced as a whole, never written in place
            self._schema = index.schema
            self._searcher = index.searcher()

    @property
    def num_pairs(self) -> int:
        """How many pairs are indexed."""
        return self._searcher.num_docs

    def search(self, lookup: Lookup) -> Hits:
        """The best pairs for `lookup`: no two with one picture, none excluded; fewer than k at the end."""
        scoring = self._scoring(lookup)
        if scoring is None:
            return Hits(hits=(), num_excluded=0, num_duplicates=0)
        keys = list(dict.fromkeys((name_key(" ".join((lookup.entity, *lookup.details))), name_key(lookup.entity))))
        wanted = self._codes.encode(lookup.facets)
        excluded = self._excluded_content(lookup, keys, wanted)
        hits: list[Hit] = []
        seen: set[int] = set()
        num_excluded = num_duplicates = 0
        for score, address, content in self._ranked(scoring, keys, wanted):
            if content in excluded:
                num_excluded += 1
            elif content in seen:
                num_duplicates += 1
            else:
                seen.add(content)
                (stored,) = self._searcher.doc(address)["payload"]
                hits.append(Hit(payload=json.loads(bytes(stored)), score=score))
                if len(hits) == lookup.k:
                    break
        return Hits(hits=tuple(hits), num_excluded=num_excluded, num_duplicates=num_duplicates)

    def _ranked(
        self, scoring: tantivy.Query, keys: Sequence[str], wanted: Mapping[str, int]
    ) -> Iterator[tuple[float, tantivy.DocAddress, int]]:
        """Every match in order: the whole name, then the name without details, then the others."""
        must, must_not = tantivy.Occur.Must, tantivy.Occur.MustNot
        names = [self._term("name", key) for key in keys]
        for position, name in enumerate(names):
            tier = [(must, scoring), (must, tantivy.Query.const_score_query(name, 0.0))]
            yield from self._pages([*tier, *((must_not, earlier) for earlier in names[:position])], wanted)
        yield from self._pages([(must, scoring), *((must_not, name) for name in names)], wanted)

    def _pages(
        self, clauses: Sequence[tuple[tantivy.Occur, tantivy.Query]], wanted: Mapping[str, int]
    ) -> Iterator[tuple[float, tantivy.DocAddress, int]]:
        """Matches by score, ties by facets and hash. A page grows until the tie at its end is whole."""
        query = tantivy.Query.boolean_query(clauses)
        limit, given = _FIRST_PAGE, 0
        while True:
            hits = self._searcher.search(query, limit, count=False).hits
            # Tantivy adds up the words of a document in no fixed order: equal scores differ in their last
            # bits.
            found = [(round(score, _SCORE_DECIMALS), address) for score, address in hits]
            is_last = len(found) < limit
            whole = found if is_last else [hit for hit in found if hit[0] > found[-1][0]]
            yield from self._in_order(whole[given:], wanted)
            if is_last:
                return
            given, limit = len(whole), limit * _PAGE_GROWTH

    def _in_order(
        self, found: Sequence[tuple[float, tantivy.DocAddress]], wanted: Mapping[str, int]
    ) -> list[tuple[float, tantivy.DocAddress, int]]:
        addresses = [address for _, address in found]
        ties, contents = self._column("tie", addresses), self._column("content", addresses)
        agreeing = [0] * len(found)
        for column, code in wanted.items():
            if code != _NO_VALUE:
                agreeing = [n + (own == code) for n, own in zip(agreeing, self._column(column, addresses), strict=True)]
        order = sorted(range(len(found)), key=lambda i: (-found[i][0], -agreeing[i], ties[i]))
        return [(found[i][0], addresses[i], contents[i]) for i in order]

    def _excluded_content(self, lookup: Lookup, keys: Sequence[str], wanted: Mapping[str, int]) -> set[int]:
        """Pictures that must not come back: excluding a pair excludes the same picture under another id."""
        excluded: set[int] = set()
        if lookup.excluded_pair_ids:
            ids = tantivy.Query.term_set_query(self._schema, "pair_id", sorted(lookup.excluded_pair_ids))
            excluded |= set(self._column("content", self._all(ids)))
        if lookup.exclude_exact:
            named = self._all(tantivy.Query.term_set_query(self._schema, "name", list(keys)))
            is_exact = [True] * len(named)
            for column, code in wanted.items():
                is_exact = [e and own == code for e, own in zip(is_exact, self._column(column, named), strict=True)]
            contents = self._column("content", named)
            excluded |= {content for content, exact in zip(contents, is_exact, strict=True) if exact}
        return excluded

    def _all(self, query: tantivy.Query) -> list[tantivy.DocAddress]:
        limit = _FIRST_PAGE
        while len(found := self._searcher.search(query, limit, count=False).hits) == limit:
            limit *= _PAGE_GROWTH
        return [address for _, address in found]

    def _column(self, name: str, addresses: list[tantivy.DocAddress]) -> list[int]:
        values = self._searcher.fast_field_values(name, addresses)
        return [int(value) if value is not None else _NO_VALUE for value in values]

    def _scoring(self, lookup: Lookup) -> tantivy.Query | None:
        """The words of the prompt as plain terms, none of them query syntax; None: there are no words."""
        weights: dict[tuple[str, str], float] = {}
        for text in lookup.details:
            weights |= dict.fromkeys(_spellings(text), DETAIL_WEIGHT)
        weights |= dict.fromkeys(_spellings(lookup.entity), 1.0)
        if not weights:
            return None
        return tantivy.Query.boolean_query(
            [
                (tantivy.Occur.Should, tantivy.Query.boost_query(self._spelled(word, stem), weight))
                for (word, stem), weight in weights.items()
            ]
        )

    def _spelled(self, word: str, stem: str) -> tantivy.Query:
        by_stem = tantivy.Query.boost_query(self._term("stems", stem), STEM_WEIGHT)
        return tantivy.Query.disjunction_max_query([self._term("words", word), by_stem])

    def _term(self, field: str, text: str) -> tantivy.Query:
        return tantivy.Query.term_query(self._schema, field, text, index_option=_INDEX_OPTION[field])


def name_key(text: str) -> str:
    """What two names share that are the same but for case, accents, punctuation and a leading article."""
    return without_article(" ".join(_WORDS.analyze(_plain(text))))


def _spellings(text: str) -> list[tuple[str, str]]:
    return list(zip(_WORDS.analyze(_plain(text)), _STEMS.analyze(_plain(text)), strict=True))


def _plain(text: str) -> str:
    """Text before it is cut into words; apostrophes go, as in slugs: "man's shoe" is "mans shoe"."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_WITHOUT_APOSTROPHES)


def _u64(digest: bytes) -> int:
    return int.from_bytes(digest[:_U64_BYTES], "big")


def _analyzer(
    build: Callable[[tantivy.TextAnalyzerBuilder], tantivy.TextAnalyzerBuilder],
) -> tantivy.TextAnalyzer:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase())
    return build(builder.filter(tantivy.Filter.ascii_fold())).build()


_WORDS = _analyzer(lambda builder: builder)
_STEMS = _analyzer(lambda builder: builder.filter(tantivy.Filter.stemmer("english")))
_INDEX_OPTION = {"pair_id": "basic", "name": "basic", "words": "freq", "stems": "freq"}
_TOKENIZER = {"pair_id": "raw", "name": "raw", "words": "reimagen_words", "stems": "reimagen_stems"}


def _with_tokenizers(index: tantivy.Index) -> tantivy.Index:
    index.register_tokenizer(_TOKENIZER["words"], _WORDS)
    index.register_tokenizer(_TOKENIZER["stems"], _STEMS)
    return index


def _schema(codes: FacetCodes) -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for field, option in _INDEX_OPTION.items():
        builder.add_text_field(field, tokenizer_name=_TOKENIZER[field], index_option=option)
    for column in ("tie", "content", *codes.columns.values()):
        builder.add_unsigned_field(column, fast=True)
    return builder.add_bytes_field("payload", stored=True).build()
