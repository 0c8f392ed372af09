"""The caption filter of WikiImages: captions over 15 tokens, with a date, or with a wiki id are dropped.

The paper (Chen et al. 2023, section 4) says no more than that; these are our definitions.

A *token* is a word: letters, digits and underscores, with apostrophes, hyphens and full stops within it ("St.", "o'clock",
"12.5" are one each). Punctuation that stands alone is none.

A *date* is
- a day in figures: 2012-05-17, 17.5.2012, 5/17/12, 20120517;
- a month's name (or its three-letter form, "Sept" too) beside a day or a year: "17 May", "May 17th", "May 2012";
- a year alone, 1000 to 2099, also of a decade or a range: "1998", "the 1920s", "1914-18", "(1887)";
- a year with its era: "44 BC", "AD 79".
No date are: a month alone ("May blossom", "March hare"), a century, a clock time, and a number with a unit, a sign, or a
decimal point ("1500 m", "$1999", "#1234", "1234.5").

A *wiki id* is
- a Wikidata item, Q with three digits or more ("Q243"; "Audi Q5" stays), or a number after "wikidata", "page id",
  "curid" or "oldid";
- a page name with its namespace ("File:Tower.jpg", "Category:Towers"), a link in double brackets, an address of a wiki;
- a picture file's name ("Tower.jpg"): a page of Wikimedia Commons;
- a number of seven digits or more: upload, Flickr and register numbers that Commons puts in names.
"""

from __future__ import annotations

import re

MAX_TOKENS = 15
TOO_LONG = f"caption over {MAX_TOKENS} tokens"
HAS_DATE = "caption has a date"
HAS_WIKI_ID = "caption has a wiki id"

_TOKEN = re.compile(r"\w+(?:['\u2019.\-\u2013]\w+)*")

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d{2})"
_UNIT = (
    r"(?:mm|cm|km|m|metres?|meters?|ft|feet|foot|miles?|mi|kg|g|lbs?|tons?|tonnes?|px|pixels?|hp|cc|kw|mw|w|v|hz|%|°)"
)
_DATE = re.compile(
    rf"""
      (?<![\d.]) \d{{4}} [-./] \d{{1,2}} [-./] \d{{1,2}} (?!\d)
    | (?<![\d.]) \d{{1,2}} (?P<sign>[-./]) \d{{1,2}} (?P=sign) (?:\d{{4}}|\d{{2}}) (?!\d)
    | (?<!\d) {_YEAR} (?:0[1-9]|1[0-2]) (?:0[1-9]|[12]\d|3[01]) (?!\d)
    | \b {_DAY} (?:\s+of)? [\s\-]+ {_MONTH}
    | \b {_MONTH} [\s\-]+ (?:the\s+)? {_DAY} \b
    | \b {_MONTH} ,? [\s\-]+ (?:of\s+)? '?{_YEAR} \b
    | \b \d{{1,4}} \s* (?:bc|bce|b\.c\.|ce|a\.d\.) (?!\w)
    | \b (?:ad|a\.d\.) \s* \d{{1,4}} \b
    | (?<![\w.,/$€£#+\-]) {_YEAR} (?:s|['\u2019]s)? (?: \s*[-\u2013/]\s* (?:{_YEAR}|\d{{2}}) )?
      (?! [\w$€£] | [.,]\d | [-/]\w | \s*{_UNIT}(?!\w) )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WIKI_ID = re.compile(
    r"""
      (?-i:\bQ\d{3,10}\b)
    | \b (?: wikidata | wiki[\s\-]?id | page[\s\-]?id | curid | oldid | revision[\s\-]?id ) [\s:=#]* Q?\d+
    | \b (?: file | image | category | template | user | talk | commons | wikipedia | wikidata | special | wp ) : (?=\S)
    | \[\[ | \]\]
    | \b (?: [\w\-]+\. )? (?: wikipedia | wikimedia | wikidata | wikisource ) \. org \b
    | \S \. (?: jpe?g | png | svg | gif | tiff? | webp | djvu ) \b
    | (?<!\d) \d{7,} (?!\d)
    """,
    re.IGNORECASE | re.VERBOSE,
)


def num_tokens(caption: str) -> int:
    """How many tokens a caption has."""
    return len(_TOKEN.findall(caption))


def has_date(caption: str) -> bool:
    """Whether a caption has a date."""
    return _DATE.search(caption) is not None


def has_wiki_id(caption: str) -> bool:
    """Whether a caption has a wiki id."""
    return _WIKI_ID.search(caption) is not None


def why_dropped(caption: str) -> tuple[str, ...]:
    """Every reason to drop a caption, in the order of the paper; empty: it stays."""
    reasons = (
        (TOO_LONG, num_tokens(caption) > MAX_TOKENS),
        (HAS_DATE, has_date(caption)),
        (HAS_WIKI_ID, has_wiki_id(caption)),
    )
    return tuple(reason for reason, holds in reasons if holds)
