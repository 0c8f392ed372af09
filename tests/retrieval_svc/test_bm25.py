"""The order of hits: whole names, then scores, then facets, then a hash; nothing is query syntax; filters inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.pairs import Change, Lookup, PairFilter, StoredPair, point_of
from retrieval_svc.words import name_key, stem_terms, tie_of, weighted_words, word_terms
from tests.retrieval_svc.bm25_modes import searched_in  # noqa: F401 (every test runs in both)

STYLES = ("noto", "twemoji", "openmoji")


def pair(pair_id: str, entity: str, style: str = "noto", **fields: Any) -> StoredPair:
    facets = {"style": style, **fields.pop("facets", {})}
    content = fields.pop("image_sha256", f"content of {pair_id}")
    return StoredPair(
        pair_id=pair_id, caption=f"a {entity}", entity=entity, facets=facets, image_sha256=content, **fields
    )


def index_of(folder: Path, pairs: Sequence[StoredPair], *, commit_size: int = 1000) -> TantivyIndex:
    index = TantivyIndex.open(folder)
    changes = [Change(point=point_of(p.pair_id), version=n, pair=p) for n, p in enumerate(pairs, 1)]
    for start in range(0, len(changes), commit_size):
        index.apply(changes[start : start + commit_size])
    return index


def found(
    index: TantivyIndex, entity: str, *details: str, limit: int = 64, style: str = "", **wanted: Any
) -> list[str]:
    facets = {"style": style} if style else {}
    lookup = Lookup(entity=entity, details=details, facets=facets, limit=limit, filter=PairFilter(**wanted))
    return [hit.pair.pair_id for hit in index.search(lookup)]


def test_a_long_tie_comes_by_facets_and_hash_however_it_is_stored(tmp_path: Path) -> None:
    """Too long to be read whole for a small limit; in one segment and in many, in any order."""
    pairs = [pair(f"p{n}", f"flag {n:04d}", STYLES[n % 3]) for n in range(3000)]
    forward = index_of(tmp_path / "a", pairs)
    backward = index_of(tmp_path / "b", pairs[::-1], commit_size=700)
    styled = [p.pair_id for p in sorted(pairs, key=lambda p: (p.facets["style"] != "twemoji", tie_of(p.pair_id)))]
    unstyled = [p.pair_id for p in sorted(pairs, key=lambda p: tie_of(p.pair_id))]
    for limit in (1, 2, 63, 64, 1100, 3001):
        for index in (forward, backward):
            assert found(index, "flag", limit=limit, style="twemoji") == styled[:limit]
            assert found(index, "flag", limit=limit) == unstyled[:limit]
    assert found(forward, "flag", limit=5, sources=frozenset({"no such source"})) == []


def test_a_word_that_has_one_spelling_scores_as_if_both_lists_were_read(tmp_path: Path) -> None:
    """ "dogs" makes the lists of "dog" and its stem differ; "bird" has one spelling, and one list is read."""
    same = [pair("d", "dog"), pair("b", "bird")]
    one = index_of(tmp_path / "one", [*same, pair("x", "cats"), pair("y", "cat")])
    both = index_of(tmp_path / "both", [*same, pair("x", "dogs"), pair("y", "cat")])
    score = {name: one.search(Lookup(entity=name))[0].score for name in ("dog", "bird")}
    assert score["dog"] == score["bird"] > 0
    stem_is_common = both.search(Lookup(entity="dog"))
    assert [hit.pair.pair_id for hit in stem_is_common] == ["d", "x"]
    word, stem = score["dog"], stem_is_common[1].score  # of the stem that two of four pairs have, alone
    assert stem_is_common[0].score == pytest.approx(stem + 0.3 * word, abs=2e-4)
    assert both.search(Lookup(entity="bird"))[0].score == score["bird"]
    assert one.search(Lookup(entity="wolf")) == []


def test_a_long_tie_of_one_name_stands_before_the_others(tmp_path: Path) -> None:
    pairs = [pair(f"p{n}", "guide dog", STYLES[n % 3]) for n in range(700)]
    others = [pair(f"q{n}", "guide dog at work") for n in range(50)]
    index = index_of(tmp_path / "index", [*pairs, *others])
    expected = [p.pair_id for p in sorted(pairs, key=lambda p: (p.facets["style"] != "noto", tie_of(p.pair_id)))]
    assert found(index, "guide dog", limit=10, style="noto") == expected[:10]
    assert found(index, "guide dog", limit=710, style="noto")[:700] == expected
    lower = [p.pair_id for p in sorted(others, key=lambda p: tie_of(p.pair_id))]
    assert found(index, "guide dog", limit=710, style="noto")[700:] == lower[:10]
    assert found(index, "guide dog", limit=800)[700:] == lower


def test_of_equal_scores_more_agreeing_facets_stand_first(tmp_path: Path) -> None:
    colors = ("red", "blue", "red", "blue")
    pairs = [pair(f"p{n}", "cat", STYLES[n // 2], facets={"color": color}) for n, color in enumerate(colors)]
    index = index_of(tmp_path / "index", pairs)
    lookup = Lookup(entity="cat", facets={"style": "twemoji", "color": "red"})
    hits = index.search(lookup)
    assert hits[0].pair.pair_id == "p2"
    assert {hit.pair.pair_id for hit in hits[1:3]} == {"p0", "p3"}
    assert len({hit.score for hit in hits}) == 1, "facets are no part of the score"


@pytest.mark.parametrize("num_pairs", [10, 2000])
def test_a_tie_comes_by_likeness_where_no_pair_agrees(tmp_path: Path, num_pairs: int) -> None:
    """Those like the value asked for in their order, then others; a hash among each. Nothing stands in for what is there."""
    styles = ("openmoji", "twemoji", "noto", "emojione", "fxemoji")
    asked = Lookup(entity="flag", facets={"style": "noto"}, alike={"style": ("fxemoji", "twemoji")})
    pairs = [pair(f"p{n}", "flag", styles[n % 5]) for n in range(num_pairs)]
    pairs.sort(key=lambda p: tie_of(p.pair_id))
    index = index_of(tmp_path / "index", pairs, commit_size=700)
    own = [p.pair_id for p in sorted(pairs, key=lambda p: p.facets["style"] != "noto")]
    order = {"fxemoji": 0, "twemoji": 1}
    others = [p for p in pairs if p.facets["style"] != "noto"]
    alike = [p.pair_id for p in sorted(others, key=lambda p: order.get(p.facets["style"], 2))]
    without = PairFilter(facets={"style": frozenset(styles) - {"noto"}})
    for limit in (1, 3, 500, num_pairs):
        assert [hit.pair.pair_id for hit in index.search(replace(asked, limit=limit))] == own[:limit]
        hits = index.search(replace(asked, limit=limit, filter=without))
        assert [hit.pair.pair_id for hit in hits] == alike[:limit]


def test_a_tier_is_the_first_that_lists_what_a_pair_has() -> None:
    facets, alike = {"style": "noto", "color": "red"}, {"style": ("fxemoji", "twemoji"), "color": ("pink",)}
    lookup = Lookup(entity="cat", facets=facets, alike=alike)
    tiers = list(lookup.tiers())
    for style in (*STYLES, "fxemoji"):
        for color in ("red", "pink", "blue"):
            has = {"style": style, "color": color}
            listed = [any(set(one) <= set(has.items()) for one in tier) for tier in tiers]
            assert lookup.tier_of(has) == listed.index(True)
    found: list[str] = []
    narrowed = lookup.tiers(found)
    assert next(narrowed) == tiers[0]
    found.append("a pair")
    assert list(narrowed) == [*tiers[1:2], [()]], "nothing stands in for what is there"
    assert lookup.places([facets, {"style": "twemoji"}, {}]) == [0, 2, 2]
    assert lookup.places([{"style": "twemoji"}, {}, {"color": "pink"}]) == [3, 4, 2]
    assert list(Lookup(entity="cat").tiers()) == [[()]] and Lookup(entity="cat").tier_of(facets) == 0


def test_whole_names_stand_before_names_that_contain_them(tmp_path: Path) -> None:
    names = {"repeated": "dog dog dog", "longer": "guide dog", "whole": "The Dog", "texas": "Paris, Texas"}
    names |= {"paris": "Paris", "texas hat": "texas hat"}
    index = index_of(tmp_path / "index", [pair(pair_id, name) for pair_id, name in names.items()])
    assert found(index, "dog")[0] == "whole"
    assert found(index, "paris", "texas")[:2] == ["texas", "paris"]
    assert found(index, "paris", "a hat")[:2] == ["paris", "texas"]
    assert found(index, "paris", "a hat", limit=1) == ["paris"]


def test_stems_find_but_do_not_mistake(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", [pair("university", "university"), pair("universal", "universal remote")])
    assert found(index, "universities")[0] == "university"
    assert found(index, "the universal")[0] == "universal"
    assert found(index, "university hall")[0] == "university"


def test_a_word_that_agrees_in_its_stem_only_counts_less(tmp_path: Path) -> None:
    """In an index where both are as rare, 0.7 of the score; beside the entity, 0.3."""
    index = index_of(tmp_path / "index", [pair("one", "zebra crossing"), pair("two", "lion taming")])
    scores = {
        text: index.search(Lookup(entity=text, details=details))[0].score
        for text, details in [("zebra", ()), ("zebras", ()), ("nothing", ("zebra",))]
    }
    assert scores["zebras"] == pytest.approx(0.7 * scores["zebra"], abs=1e-3)
    assert scores["nothing"] == pytest.approx(0.3 * scores["zebra"], abs=1e-3)


@pytest.mark.parametrize(
    ("entity", "expected"),
    [
        ("flag: Côte d\u2019Ivoire", "ivoire"),
        ("FLAG COTE D'IVOIRE", "ivoire"),
        ("1st place medal", "medal"),
        ("man\u2019s shoe", "shoe"),
        ("t. rex", "rex"),
        ("\uff54\uff0d\uff52\uff45\uff58", "rex"),
        ('+rex -"shoe AND (OR:^2~ *?[ TO ]} \\', "rex"),
    ],
)
def test_punctuation_accents_and_query_syntax_are_plain_text(tmp_path: Path, entity: str, expected: str) -> None:
    names = {"ivoire": "flag cote divoire", "medal": "1st place medal", "shoe": "mans shoe", "rex": "T-Rex"}
    index = index_of(tmp_path / "index", [pair(pair_id, name) for pair_id, name in names.items()])
    assert found(index, entity)[0] == expected


def test_nothing_to_look_up_finds_nothing(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", [pair("a", "cat"), pair("snow", "☃")])
    for entity in ("", "☃", "zebra"):
        assert found(index, entity) == []
    assert index.exact("☃", {}) == []
    assert found(index, "cat", limit=0) == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"facets": {"style": frozenset({"noto"})}}, "a"),
        ({"facets": {"style": frozenset({"noto", "twemoji"})}}, "ab"),
        ({"facets": {"style": frozenset({"noto"}), "color": frozenset({"red"})}}, ""),
        ({"facets": {"color": frozenset({"red"})}}, "b"),
        ({"licenses": frozenset({"MIT", "CC0"})}, "ac"),
        ({"sources": frozenset({"web"})}, "bc"),
        ({"sources": frozenset({"web"}), "licenses": frozenset({"MIT"})}, "c"),
        ({"safe": True}, "a"),
        ({"safe": False}, "bcd"),
        ({"excluded_pair_ids": frozenset({"a", "no such pair"})}, "bcd"),
        ({"excluded_contents": frozenset({"one", "http://x/d.png"})}, "c"),
        ({"excluded_names": frozenset({"cat"})}, "d"),
        ({"excluded_names": frozenset({"no such name"}), "safe": True}, "a"),
    ],
)
def test_filters_select_inside_the_search(tmp_path: Path, wanted: dict[str, Any], expected: str) -> None:
    """Also with a limit of one: what a filter leaves out takes no place."""
    pairs = [
        pair("a", "The Cat", "noto", license="MIT", source="npm", safe=True, image_sha256="one"),
        pair("b", "cat", "twemoji", license="GPL", source="web", image_sha256="one", facets={"color": "red"}),
        pair("c", "cat", "openmoji", license="MIT", source="web"),
        pair("d", "wild cat", "openmoji", image_sha256="", image_uri="http://x/d.png"),
    ]
    index = index_of(tmp_path / "index", pairs)
    assert "".join(sorted(found(index, "cat", **wanted))) == expected
    assert len(found(index, "cat", limit=1, **wanted)) == min(1, len(expected))


def test_a_hit_gives_the_whole_pair_back(tmp_path: Path) -> None:
    stored = pair(
        "a", "the größte Katze", "noto", author="me", source="here", license="CC0", safe=True, image_format="png",
        image_uri="http://x/ä.png", attributes={"width": "7", "": ""}, version=12,
    )  # fmt: skip
    bare = StoredPair(pair_id="b", caption="", entity="")
    index = index_of(tmp_path / "index", [stored, bare])
    (hit,) = index.search(Lookup(entity="katze"))
    assert hit.pair == stored and hit.embedding is None and hit.score == round(hit.score, 4) > 0
    assert index.num_pairs == 2


def test_exact_gives_all_of_a_name_that_have_the_facets(tmp_path: Path) -> None:
    pairs = [pair(f"p{n:03d}", ("The Cat!", "cat", "wild cat")[n % 3], STYLES[n % 2]) for n in range(300)]
    index = index_of(tmp_path / "index", pairs)
    assert index.exact("a CAT", {}) == [p for p in pairs if p.entity != "wild cat"]
    noto = [p for p in pairs if p.entity != "wild cat" and p.facets["style"] == "noto"]
    assert index.exact("cat", {"style": "noto"}) == noto
    assert index.exact("cat", {"style": "noto", "color": "red"}) == []


def test_words_and_names() -> None:
    assert name_key("The Côte d'Azur!") == name_key("cote dazur") == "cote dazur"
    assert name_key("a") == "a"
    assert word_terms("The Guide-Dogs") == ["the", "guide", "dogs"]
    assert stem_terms("The Guide-Dogs") == ["the", "guid", "dog"]
    lookup = Lookup(entity="dogs", details=("dogs with hats",))
    assert weighted_words(lookup) == {("dogs", "dog"): 1.0, ("with", "with"): 0.3, ("hats", "hat"): 0.3}
