"""What counts as a token, a date and a wiki id, on constructed captions."""

from __future__ import annotations

import pytest

from retrieval_svc.imports.caption_filter import (
    HAS_DATE,
    HAS_WIKI_ID,
    MAX_TOKENS,
    TOO_LONG,
    has_date,
    has_wiki_id,
    num_tokens,
    why_dropped,
)


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("", 0),
        ("a dog", 2),
        ("St. Mary's Church , Berlin - Mitte !", 5),
        ("12.5 o'clock rock-and-roll", 3),
        ("... -- !!", 0),
        ("Fernsehturm München (Außen)", 3),
        ("富士山 と 桜", 3),
    ],
)
def test_tokens_are_words(caption: str, tokens: int) -> None:
    assert num_tokens(caption) == tokens


def test_fifteen_tokens_stay_and_sixteen_do_not() -> None:
    assert why_dropped(" ".join(["word"] * MAX_TOKENS)) == ()
    assert why_dropped(" ".join(["word"] * MAX_TOKENS) + " , !") == ()
    assert why_dropped(" ".join(["word"] * (MAX_TOKENS + 1))) == (TOO_LONG,)


@pytest.mark.parametrize(
    "caption",
    [
        "Eiffel Tower 2012-05-17",
        "Eiffel Tower 17.5.2012",
        "Eiffel Tower, 5/17/12",
        "Eiffel Tower 20120517 night",
        "Eiffel Tower on 17 May",
        "Eiffel Tower on the 17th of May",
        "Eiffel Tower, May 17th, at night",
        "Eiffel Tower May 2012",
        "Eiffel Tower, Sept. 1998",
        "Eiffel Tower 1998",
        "Eiffel Tower (1889)",
        "Paris in the 1920s",
        "Trenches 1914-18",
        "Trenches, 1914\u20131918",
        "Bust of Caesar, 44 BC",
        "Pompeii AD 79",
        "Tower, 2012.",
    ],
)
def test_dates(caption: str) -> None:
    assert has_date(caption)
    assert why_dropped(caption)[0] == HAS_DATE


@pytest.mark.parametrize(
    "caption",
    [
        "May blossom in the park",
        "A March hare and a June bug",
        "A 19th century windmill",
        "Clock at 12:30",
        "Lake at 1500 m above the sea",
        "A bridge 1200 feet long",
        "Boeing 747 and Airbus A380",
        "Bus number 3000",
        "Route 66, 24 Hours",
        "A watch for $1999",
        "Locomotive #1234",
        "Pi is 3.1415, or 1234.5",
        "Model K1998-B",
        "Flat 12-3",
        "Street of the Fifth of Nothing",
        "Marchesa in 3 acts",
        "Decorated hall",
    ],
)
def test_no_dates(caption: str) -> None:
    assert not has_date(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "Eiffel Tower Q243",
        "wikidata: Q5",
        "page id 91234",
        "Tower curid=99",
        "File:Tour Eiffel Wikimedia",
        "Category:Towers in Paris",
        "The [[Eiffel Tower]] in Paris",
        "en.wikipedia.org/wiki/Tower",
        "Tour Eiffel at night.jpg",
        "Golden Gate Bridge (8120341129)",
    ],
)
def test_wiki_ids(caption: str) -> None:
    assert has_wiki_id(caption)
    assert why_dropped(caption) == (HAS_WIKI_ID,)


@pytest.mark.parametrize(
    "caption",
    [
        "An Audi Q5 and an Infiniti Q50",
        "A file: the tool",
        "A page of a book",
        "A wiki wagon",
        "Population 123456",
        "St. Gifford church",
        "Q and A",
        "user manual",
    ],
)
def test_no_wiki_ids(caption: str) -> None:
    assert not has_wiki_id(caption)


def test_all_reasons_are_told_in_order() -> None:
    caption = " ".join(["word"] * 16) + " 1998 File:Tower.jpg"
    assert why_dropped(caption) == (TOO_LONG, HAS_DATE, HAS_WIKI_ID)
