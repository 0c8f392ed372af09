"""One lookup in one view of a Tantivy index: what is asked, how ties are broken, how pairs are read. See `bm25.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import tantivy

from retrieval_svc.pairs import Lookup, PairFilter, Scored, StoredPair, point_of
from retrieval_svc.words import STEM_WEIGHT, STEMS, WORD_WEIGHT, WORDS, name_key, weighted_words

RAW_FIELDS = ("point", "name", "facet", "license", "source", "safe", "content", "epoch", "level")  # one term, as it is
THINNING = 2  # bits of the hash: each level of thinning keeps a quarter
NUM_LEVELS = 12

_SCORE_DECIMALS = 4
_SAME_SCORE = 5e-5  # Tantivy adds up the words of a document in no fixed order: equal scores differ in their last bits
_TIE_ROOM = 3  # so many times the limit is asked for at first: most ties end within it
_TIE_WINDOW = 8  # a tie is read whole up to so many times the limit; a longer one is thinned out by its hash
_PAIR = msgspec.json.Decoder(StoredPair)

_Clauses = list[tuple[tantivy.Occur, tantivy.Query]]
_Hit = tuple[float, tantivy.DocAddress]
_Place = tuple[int, int]  # of a document: what an address does not do, compare


class LexicalSearch:
    """One lookup in one view."""

    def __init__(self, searcher: tantivy.Searcher, schema: tantivy.Schema, lookup: Lookup) -> None:
        self._searcher = searcher
        self._schema = schema
        self._lookup = lookup
        self._filter = _filter_clauses(schema, lookup.filter)

    def run(self) -> list[Scored]:
        """The best pairs, tier by tier."""
        return [scored(*found) for found in self.stored()]

    def stored(self) -> list[tuple[float, bytes]]:
        """The same, each as its score and the bytes of its document: see `scored`."""
        lookup = self._lookup
        scoring = _scoring(self._searcher, self._schema, lookup)
        if scoring is None or lookup.limit < 1:
            return []
        keys = dict.fromkeys((name_key(" ".join((lookup.entity, *lookup.details))), name_key(lookup.entity)))
        known = [key for key in keys if self._searcher.doc_freq("name", key)]
        found: list[_Hit] = []
        given: set[_Place] = set()
        for tier in (*([_selecting(term(self._schema, "name", key))] for key in known), []):
            clauses: _Clauses = [(tantivy.Occur.Must, scoring), *tier, *self._filter]
            found += self._best(clauses, lookup.limit - len(found), given)
            if len(found) == lookup.limit:
                break
        return [(round(score, _SCORE_DECIMALS), _payload(self._searcher, at)) for score, at in found]

    def _best(self, clauses: _Clauses, limit: int, given: set[_Place]) -> list[_Hit]:
        """At most `limit` matches by score, ties by tier and hash; adds them to `given`, and gives none of those."""
        room = _TIE_ROOM * limit
        hits = self._hits(clauses, room + len(given), given)
        if len(hits) > limit and _tied(hits[limit], hits[limit - 1]):
            head = hits[limit]
            if len(hits) >= room and _tied(hits[-1], head):  # the tie goes on
                above = [hit for hit in hits if not _tied(hit, head)]
                hits = above + self._tie(clauses, head, limit - len(above), given)
            else:
                hits = [hit for hit in hits if hit[0] >= head[0] - _SAME_SCORE]
        else:
            hits = hits[:limit]
        best = self._in_order(hits, limit)
        given.update(_place(hit) for hit in best)
        return best

    def _tie(self, clauses: _Clauses, head: _Hit, limit: int, given: set[_Place]) -> list[_Hit]:
        """The first `limit` of the matches that tie with `head`, by the lookup's tiers, then by hash."""
        chosen: list[_Hit] = []
        for tier in self._lookup.tiers(chosen):
            narrowed = [*clauses, *([_selecting(self._any_of(tier))] if all(tier) else [])]
            taken = given | {_place(hit) for hit in chosen}
            chosen += self._thinned(narrowed, head, limit - len(chosen), taken)
            if len(chosen) == limit:
                break
        return chosen

    def _any_of(self, tier: Sequence[Sequence[tuple[str, str]]]) -> tantivy.Query:
        """Documents that have all of the facets of one of these."""

        def all_of(facets: Sequence[tuple[str, str]]) -> tantivy.Query:
            terms = [term(self._schema, "facet", facet_term(*facet)) for facet in facets]
            return tantivy.Query.boolean_query([(tantivy.Occur.Must, one) for one in terms])

        return tantivy.Query.boolean_query([(tantivy.Occur.Should, all_of(facets)) for facets in tier])

    def _thinned(self, clauses: _Clauses, head: _Hit, limit: int, given: set[_Place]) -> list[_Hit]:
        """The first `limit` by hash of the matches that tie with `head`, without reading a long tie to its end.

        Where the tie does not fit into the window, only documents whose hash is small enough are asked for: they
        are the first of it.
        """
        window = _TIE_WINDOW * self._lookup.limit
        found: dict[_Place, _Hit] = {}
        for level in range(NUM_LEVELS + 1):
            thin = [_selecting(term(self._schema, "level", str(level)))] if level else []
            hits = self._hits([*clauses, *thin], window + len(given), given)
            tied = {_place(hit): hit for hit in hits if _tied(hit, head)}
            # Thinned out too far (very unlikely): what the level before has shown fills up.
            found = tied if len(tied) >= limit or not level else {**found, **tied}
            if len(hits) < window or hits[-1][0] < head[0] - _SAME_SCORE:
                break  # the tie is whole
        hits = list(found.values())
        ties = self._ties(hits)
        order = sorted(range(len(hits)), key=lambda position: ties[position])
        return [hits[position] for position in order[:limit]]

    def _hits(self, clauses: _Clauses, limit: int, given: set[_Place]) -> list[_Hit]:
        """At most `limit` matches by score, less those in `given`."""
        # A lone clause is asked as it is: Tantivy then skips documents that cannot be among the best.
        query = clauses[0][1] if len(clauses) == 1 else tantivy.Query.boolean_query(clauses)
        hits = self._searcher.search(query, limit, count=False).hits
        return [hit for hit in hits if _place(hit) not in given] if given else hits

    def _in_order(self, hits: Sequence[_Hit], limit: int) -> list[_Hit]:
        """The first `limit` of `hits`, which are by score, ordered within equal scores."""
        ties, groups = self._ties(hits), list[tuple[float, list[int]]]()
        for number, (score, _) in enumerate(hits):
            if not groups or abs(score - groups[-1][0]) > _SAME_SCORE:
                groups.append((score, []))
            groups[-1][1].append(number)
        ordered: list[_Hit] = []
        for score, members in groups:
            places = self._places([hits[number] for number in members])
            keyed = sorted(zip(places, (ties[number] for number in members), members, strict=True))
            ordered += [(score, hits[number][1]) for _, _, number in keyed]
        return ordered[:limit]

    def _places(self, hits: Sequence[_Hit]) -> list[int]:
        """`Lookup.places` of hits of one score."""
        if not self._lookup.facets:
            return [0] * len(hits)
        return self._lookup.places([load(self._searcher, address).facets for _, address in hits])

    def _ties(self, hits: Sequence[_Hit]) -> list[int]:
        """`tie_of` each."""
        return [int(tie or 0) for tie in self._searcher.fast_field_values("tie", [address for _, address in hits])]


def _scoring(searcher: tantivy.Searcher, schema: tantivy.Schema, lookup: Lookup) -> tantivy.Query | None:
    """The words of the lookup as plain terms, none of them query syntax; None: no pair has any of them.

    A document that has the word has its stem, too: the two weights add up to 1. Where nobody spells the stem in another
    way, both lists are one and the same, and one of them is read. A flat sum of terms is what lets Tantivy skip whole
    blocks of documents.
    """
    clauses: _Clauses = []
    for (word, stem), weight in weighted_words(lookup).items():
        num_words, num_stems = searcher.doc_freq("words", word), searcher.doc_freq("stems", stem)
        parts = (("words", word, WORD_WEIGHT), ("stems", stem, STEM_WEIGHT))
        for field, text, part in parts if num_words < num_stems else (("stems", stem, 1.0),):
            if num_stems:
                boosted = tantivy.Query.boost_query(term(schema, field, text), weight * part)
                clauses.append((tantivy.Occur.Should, boosted))
    return tantivy.Query.boolean_query(clauses) if clauses else None


def _filter_clauses(schema: tantivy.Schema, wanted: PairFilter) -> _Clauses:
    def any_of(field: str, values: Iterable[str]) -> tantivy.Query:
        return tantivy.Query.term_set_query(schema, field, sorted(values))

    groups = [("facet", [facet_term(name, value) for value in values]) for name, values in wanted.facets.items()]
    groups += [("license", list(wanted.licenses)), ("source", list(wanted.sources))]
    groups += [("safe", [flag(wanted.safe)])] if wanted.safe is not None else []
    excluded = (
        ("point", [point_of(pair_id) for pair_id in wanted.excluded_pair_ids]),
        ("content", list(wanted.excluded_contents)),
        ("name", list(wanted.excluded_names)),
    )
    clauses = [_selecting(any_of(field, values)) for field, values in groups if values]
    return clauses + [(tantivy.Occur.MustNot, any_of(field, values)) for field, values in excluded if values]


def pair_bytes(pair: StoredPair) -> bytes:
    """The pair as a document holds it; what is empty takes no room."""
    needed = {"caption", "entity"}
    fields = {**vars(pair), "facets": dict(pair.facets), "attributes": dict(pair.attributes)}
    return msgspec.json.encode({name: value for name, value in fields.items() if value or name in needed})


def load(searcher: tantivy.Searcher, address: tantivy.DocAddress) -> StoredPair:
    """The pair of a document."""
    return _PAIR.decode(_payload(searcher, address))


def scored(score: float, stored: bytes) -> Scored:
    """What `LexicalSearch.stored` gives, as a pair."""
    return Scored(pair=_PAIR.decode(stored), score=score)


def attached(folder: Path) -> tantivy.Index:
    """The index in `folder`, or an empty one made there. What it shows is changed by `reload` alone, as a whole.

    Raises:
        ValueError: it is damaged, or of another make.
    """
    index = tantivy.Index(_schema(), path=str(folder))
    index.register_tokenizer("reimagen_words", WORDS)
    index.register_tokenizer("reimagen_stems", STEMS)
    index.config_reader(reload_policy="manual")
    return index


def term(schema: tantivy.Schema, field: str, text: str) -> tantivy.Query:
    """Documents that have this very term."""
    return tantivy.Query.term_query(schema, field, text, index_option="basic" if field in RAW_FIELDS else "freq")


def _payload(searcher: tantivy.Searcher, address: tantivy.DocAddress) -> bytes:
    (stored,) = searcher.doc(address)["payload"]
    return stored


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for field in RAW_FIELDS:
        builder.add_text_field(field, tokenizer_name="raw", index_option="basic")
    for field in ("words", "stems"):
        builder.add_text_field(field, tokenizer_name=f"reimagen_{field}", index_option="freq")
    builder.add_unsigned_field("tie", fast=True)
    return builder.add_bytes_field("payload", stored=True).build()


def _selecting(query: tantivy.Query) -> tuple[tantivy.Occur, tantivy.Query]:
    """A clause that selects and adds nothing to the score."""
    return tantivy.Occur.Must, tantivy.Query.const_score_query(query, 0.0)


def _tied(one: _Hit, other: _Hit) -> bool:
    return abs(one[0] - other[0]) <= _SAME_SCORE


def _place(hit: _Hit) -> _Place:
    return hit[1].segment_ord, hit[1].doc


def facet_term(name: str, value: str) -> str:
    """One facet as a term."""
    return f"{name}={value}"


def flag(value: bool) -> str:
    """True or False as a term."""
    return "1" if value else "0"
