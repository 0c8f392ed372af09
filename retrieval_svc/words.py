"""How text becomes words for BM25: one analysis for every lexical index, and for the names of entities.

Tantivy's tokenizer and stemmer, so that an index that is not Tantivy's ranks the same words.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable

import tantivy

from retrieval_svc.pairs import Lookup
from retrieval_svc.query import without_article

STEM_WEIGHT = 0.7  # of a word that agrees in its stem only
WORD_WEIGHT = 1.0 - STEM_WEIGHT  # what the same spelling adds to that
DETAIL_WEIGHT = 0.3  # of a word that stands beside the entity ("wearing a hat")

_TIE_BYTES = 8
_WITHOUT_APOSTROPHES = str.maketrans("", "", "'`\u00b4\u2018\u2019\u02bc")


def name_key(text: str) -> str:
    """What two names share that are the same but for case, accents, punctuation and a leading article."""
    return without_article(" ".join(word_terms(text)))


def word_terms(text: str) -> list[str]:
    """The words of `text` in order, folded: case, accents and apostrophes do not count."""
    return WORDS.analyze(plain(text))


def stem_terms(text: str) -> list[str]:
    """The stem of each of `word_terms`, in the same order."""
    return STEMS.analyze(plain(text))


def weighted_words(lookup: Lookup) -> dict[tuple[str, str], float]:
    """What BM25 looks for: each (word, stem) of the lookup once, and its weight."""
    weights: dict[tuple[str, str], float] = {}
    for text in lookup.details:
        weights |= dict.fromkeys(zip(word_terms(text), stem_terms(text), strict=True), DETAIL_WEIGHT)
    entity = lookup.entity
    return weights | dict.fromkeys(zip(word_terms(entity), stem_terms(entity), strict=True), 1.0)


def tie_of(pair_id: str) -> int:
    """Orders pairs of equal score: 64 bits of a hash."""
    return int.from_bytes(hashlib.sha256(pair_id.encode()).digest()[:_TIE_BYTES], "big")


def plain(text: str) -> str:
    """Text before it is cut into words; apostrophes go, as in slugs: "man's shoe" is "mans shoe"."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_WITHOUT_APOSTROPHES)


def _analyzer(
    build: Callable[[tantivy.TextAnalyzerBuilder], tantivy.TextAnalyzerBuilder],
) -> tantivy.TextAnalyzer:
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase())
    return build(builder.filter(tantivy.Filter.ascii_fold())).build()


WORDS = _analyzer(lambda builder: builder)
STEMS = _analyzer(lambda builder: builder.filter(tantivy.Filter.stemmer("english")))
