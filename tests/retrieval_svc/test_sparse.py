"""BM25 as sparse vectors: the numbers, and the very order that the Tantivy index gives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.pairs import LexicalIndex, Lookup, PairFilter, StoredPair
from retrieval_svc.point_store import PointStore
from retrieval_svc.sparse import AVERAGE_WORDS, SparseIndex, dimension, document_vector, query_vector
from retrieval_svc.words import tie_of
from tests.retrieval_svc.stores import NOW, make_blank, open_store

Opener = Callable[[Sequence[StoredPair]], LexicalIndex]
STYLES = ("noto", "twemoji", "openmoji")
INDEXES = ("tantivy", "sparse-edge", "sparse-server_local_imitation")


def pair(pair_id: str, entity: str, style: str = "noto", **fields: Any) -> StoredPair:
    given = {"facets": {"style": style}, "image_sha256": f"content of {pair_id}"} | fields
    return StoredPair(pair_id=pair_id, caption=f"a {entity}", entity=entity, **given)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blank(tmp_path_factory.mktemp("blank") / "pairs")


@pytest.fixture(params=INDEXES)
def index_of(request: pytest.FixtureRequest, blank: Path, tmp_path: Path) -> Iterator[Opener]:
    """Makes an index of the kind over a store with the given pairs."""
    with open_store(
        request.param.removeprefix("sparse-").replace("tantivy", "edge"), blank, tmp_path / "pairs"
    ) as store:

        def opener(pairs: Sequence[StoredPair]) -> LexicalIndex:
            fill(store, pairs)
            if request.param != "tantivy":
                return SparseIndex(store)
            index = TantivyIndex.open(tmp_path / "bm25")
            index.apply(store.changes(0, len(pairs)))
            return index

        yield opener


def fill(store: PointStore, pairs: Sequence[StoredPair]) -> None:
    versioned = [replace(p, version=NOW + number) for number, p in enumerate(pairs)]
    for start in range(0, len(versioned), 500):
        batch = versioned[start : start + 500]
        store.upsert(batch, [None] * len(batch))


def found(
    index: LexicalIndex, entity: str, *details: str, limit: int = 64, style: str = "", **wanted: Any
) -> list[str]:
    facets = {"style": style} if style else {}
    filter = PairFilter(**wanted)
    hits = index.search(Lookup(entity=entity, details=details, facets=facets, limit=limit, filter=filter))
    return [hit.pair.pair_id for hit in hits]


def test_a_document_is_its_term_frequencies_saturated() -> None:
    one = document_vector("guide dog")
    assert len(one.indices) == 4 and list(one.indices) == sorted(one.indices)
    value = 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / AVERAGE_WORDS))
    assert one.values == pytest.approx([value] * 4)
    twice = dict(zip(document_vector("dog dog").indices, document_vector("dog dog").values, strict=True))
    assert twice[dimension("word", "dog")] == pytest.approx(4.4 / (2 + 1.2 * (0.25 + 0.75 * 2 / AVERAGE_WORDS)))
    assert document_vector("").indices == ()


def test_a_query_is_its_weights() -> None:
    asked = query_vector(Lookup(entity="dogs", details=("a hat",)))
    weights = dict(zip(asked.indices, asked.values, strict=True))
    assert weights[dimension("stem", "dog")] == pytest.approx(0.7)
    assert weights[dimension("word", "dogs")] == pytest.approx(0.3)
    assert weights[dimension("stem", "hat")] == pytest.approx(0.21)
    assert query_vector(Lookup(entity="☃")).indices == ()


def test_dimensions_are_for_good() -> None:
    """They stand in stored vectors: another hash would find nothing of what is stored."""
    assert (dimension("word", "dog"), dimension("stem", "dog")) == (2625164468, 1514920154)
    assert 0 <= dimension("word", "größe") < 2**32


def test_the_score_is_bm25(blank: Path, tmp_path: Path) -> None:
    """By hand: ln(1 + (N - n + 1/2) / (n + 1/2)) times the saturated frequency, words and stems by their weights."""
    with open_store("edge", blank, tmp_path / "pairs") as store:
        fill(store, [pair("a", "guide dog"), pair("b", "hot dog"), pair("c", "cat"), pair("d", "dogs")])
        store.delete(["c"], NOW + 99)
        (best, *others) = SparseIndex(store).search(Lookup(entity="guide"))
        assert not others
        idf, saturated = math.log(1 + (3 - 1 + 0.5) / 1.5), 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / AVERAGE_WORDS))
        assert best.score == pytest.approx(idf * saturated, rel=1e-3)


def test_whole_names_stand_before_names_that_contain_them(index_of: Opener) -> None:
    names = {"repeated": "dog dog dog", "longer": "guide dog", "whole": "The Dog", "texas": "Paris, Texas"}
    names |= {"paris": "Paris", "texas hat": "texas hat"}
    index = index_of([pair(pair_id, name) for pair_id, name in names.items()])
    assert found(index, "dog") == ["whole", "repeated", "longer"]
    assert found(index, "paris", "texas")[:2] == ["texas", "paris"]
    assert found(index, "paris", "a hat")[:2] == ["paris", "texas"]
    assert found(index, "paris", "a hat", limit=1) == ["paris"]
    assert (index.num_pairs, index.generation) == (6, NOW + 5)


def test_stems_find_but_do_not_mistake(index_of: Opener) -> None:
    index = index_of([pair("university", "university"), pair("universal", "universal remote")])
    assert found(index, "universities")[0] == "university"
    assert found(index, "the universal")[0] == "universal"
    assert found(index, "university hall")[0] == "university"


def test_of_equal_scores_more_agreeing_facets_stand_first(index_of: Opener) -> None:
    colors = ("red", "blue", "red", "blue")
    facets = [{"style": STYLES[number // 2], "color": color} for number, color in enumerate(colors)]
    index = index_of([pair(f"p{number}", "cat", facets=given) for number, given in enumerate(facets)])
    hits = index.search(Lookup(entity="cat", facets={"style": "twemoji", "color": "red"}))
    assert hits[0].pair.pair_id == "p2"
    assert {hit.pair.pair_id for hit in hits[1:3]} == {"p0", "p3"}
    assert len({hit.score for hit in hits}) == 1


def test_a_tie_comes_by_likeness_where_no_pair_agrees(index_of: Opener) -> None:
    pairs = [pair(f"p{number}", "flag", STYLES[number % 3]) for number in range(900)]
    pairs.sort(key=lambda p: tie_of(p.pair_id))
    index, alike = index_of(pairs), {"style": ("openmoji",)}
    own = [p.pair_id for p in sorted(pairs, key=lambda p: p.facets["style"] != "noto")]
    others = [p for p in pairs if p.facets["style"] != "noto"]
    stand_ins = [p.pair_id for p in sorted(others, key=lambda p: p.facets["style"] != "openmoji")]
    without = PairFilter(facets={"style": frozenset({"openmoji", "twemoji"})})
    for limit in (2, 350, 900):
        asked = Lookup(entity="flag", facets={"style": "noto"}, alike=alike, limit=limit)
        assert [hit.pair.pair_id for hit in index.search(asked)] == own[:limit]
        assert [hit.pair.pair_id for hit in index.search(replace(asked, filter=without))] == stand_ins[:limit]


@pytest.mark.parametrize("limit", [1, 2, 6, 12, 40, 240])
def test_a_long_tie_with_few_pairs_that_agree_is_filled_by_hash(index_of: Opener, limit: int) -> None:
    styles = {0: "noto", **{number: "openmoji" for number in range(1, 12)}}
    pairs = [pair(f"p{number}", "flag", styles.get(number, "twemoji")) for number in range(240)]
    index = index_of(pairs)
    expected = sorted(pairs, key=lambda p: (p.facets["style"] != "noto", tie_of(p.pair_id)))
    asked = Lookup(entity="flag", facets={"style": "noto"}, alike={"style": ("openmoji",)}, limit=limit)
    assert [hit.pair.pair_id for hit in index.search(asked)] == [p.pair_id for p in expected[:limit]]


def test_a_tie_too_long_to_be_read_comes_by_facets_and_hash(index_of: Opener) -> None:
    pairs = [pair(f"p{number}", f"flag {number:04d}", STYLES[number % 3]) for number in range(900)]
    index = index_of([*pairs, pair("flags", "flag flag flag"), pair("flag", "flag", "noto")])
    styled = [p.pair_id for p in sorted(pairs, key=lambda p: (p.facets["style"] != "twemoji", tie_of(p.pair_id)))]
    unstyled = [p.pair_id for p in sorted(pairs, key=lambda p: tie_of(p.pair_id))]
    for limit in (3, 4, 20):
        assert found(index, "flag", limit=limit) == ["flag", "flags", *unstyled][:limit]
        assert found(index, "flag", limit=limit, style="twemoji") == ["flag", "flags", *styled][:limit]
    noto: dict[str, Any] = {"facets": {"style": frozenset(("noto",))}}
    expected = [name for name in unstyled if int(name[1:]) % 3 == 0]
    assert found(index, "flag", limit=5, style="twemoji", **noto) == ["flag", "flags", *expected][:5]


def test_filters_select_inside_the_search(index_of: Opener) -> None:
    index = index_of(
        [
            pair("a", "cat", license="MIT", source="icons", safe=True),
            pair("b", "cat", "twemoji", license="CC0", source="web"),
            pair("c", "cat face", "openmoji", license="MIT", source="web"),
            pair("d", "dog"),
        ]
    )
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"facets": {"style": frozenset(("noto",))}}, ["a"]),
        ({"licenses": frozenset(("MIT",))}, ["a", "c"]),
        ({"sources": frozenset(("web",)), "licenses": frozenset(("MIT",))}, ["c"]),
        ({"safe": True}, ["a"]),
        ({"safe": False}, ["b", "c"]),
        ({"excluded_pair_ids": frozenset(("a",))}, ["b", "c"]),
        ({"excluded_contents": frozenset(("content of b",))}, ["a", "c"]),
        ({"excluded_names": frozenset(("cat",))}, ["c"]),
    ]
    for wanted, expected in cases:
        assert sorted(found(index, "cat", **wanted)) == expected, wanted


def test_exact_and_nothing(index_of: Opener) -> None:
    index = index_of([pair("b", "The Cat"), pair("a", "cat", "twemoji"), pair("snow", "☃")])
    assert [p.pair_id for p in index.exact("a cat", {})] == ["a", "b"]
    assert [p.pair_id for p in index.exact("cat", {"style": "noto"})] == ["b"]
    assert index.exact("☃", {}) == []
    for nothing in ("", "☃", "zebra"):
        assert found(index, nothing) == []
    assert found(index, "cat", limit=0) == []


def test_it_ranks_as_tantivy_does(blank: Path, tmp_path: Path) -> None:
    """Names of words as frequent as words are; the two differ in the average length alone."""
    chance = random.Random(0)
    words = [f"w{chance.randrange(16**4):04x}" for _ in range(300)]
    weights = [1 / rank for rank in range(1, 301)]
    names = [" ".join(chance.choices(words, weights, k=chance.choice((1, 2, 2, 3, 4)))) for _ in range(500)]
    pairs = [pair(f"p{number}", chance.choice(names), chance.choice(STYLES)) for number in range(1200)]
    with open_store("edge", blank, tmp_path / "pairs") as store:
        fill(store, pairs)
        tantivy, sparse = TantivyIndex.open(tmp_path / "bm25"), SparseIndex(store)
        tantivy.apply(store.changes(0, len(pairs)))
        same_first, overlap = 0, 0.0
        for name in chance.sample(names, 60):
            by_tantivy, by_sparse = found(tantivy, name, limit=10), found(sparse, name, limit=10)
            same_first += by_tantivy[:1] == by_sparse[:1]
            overlap += len(set(by_tantivy) & set(by_sparse)) / max(len(by_tantivy), len(by_sparse))
        tantivy.close()
    assert same_first >= 59
    assert overlap / 60 >= 0.95
