"""What is stored of a pair, and how filters are put."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.service.errors import DataLoss
from retrieval_svc.pairs import Change, PairFilter, StoredPair, point_of
from retrieval_svc.payload import change_of, conditions, is_point, pair_of, payload_of, tombstone, unit, whole_changes
from retrieval_svc.words import tie_of

PAIR = StoredPair(
    pair_id="dog/1",
    caption="a Guide Dog, noto style",
    entity="The Guide Dog",
    facets={"style": "noto", "color": "red"},
    author="A",
    source="S",
    license="MIT",
    safe=True,
    image_sha256="ab" * 32,
    image_format="png",
    attributes={"k": "v"},
    version=1763848800123456789,
)


def test_a_pair_comes_back_as_it_was() -> None:
    assert pair_of(point_of("dog/1"), payload_of(PAIR)) == PAIR


def test_the_payload_holds_what_filters_ask_for() -> None:
    payload = payload_of(PAIR)
    assert payload["facet"] == ["color=red", "style=noto"]
    assert payload["name"] == "guide dog"
    assert (payload["content"], payload["safe"], payload["safety"]) == ("ab" * 32, True, "safe")
    assert payload["version"] == 1763848800123456789


def test_a_tombstone_holds_nothing_of_the_pair_and_is_no_pair() -> None:
    assert tombstone(7) == {"version": 7, "deleted": True}
    assert change_of("p", tombstone(7)) == Change(point="p", version=7, pair=None)
    with pytest.raises(DataLoss, match="holds no pair"):
        pair_of("p", tombstone(7))


def test_damage_is_named() -> None:
    payload = payload_of(PAIR)
    del payload["license"]
    with pytest.raises(DataLoss, match=r"'dog/1'.*'license'"):
        pair_of(point_of("dog/1"), payload)
    with pytest.raises(DataLoss, match="belongs elsewhere"):
        pair_of(point_of("cat/1"), payload_of(PAIR))


def test_a_filter_becomes_conditions() -> None:
    wanted = PairFilter(
        facets={"style": frozenset(("b", "a")), "color": frozenset()},
        licenses=frozenset(("MIT",)),
        sources=frozenset(("S",)),
        safe=False,
        excluded_pair_ids=frozenset(("x",)),
        excluded_contents=frozenset(("c",)),
        excluded_names=frozenset(("n",)),
    )
    found = conditions(wanted, names=frozenset(("dog",)))
    assert found.must == (
        ("facet", ("style=a", "style=b")),
        ("license", ("MIT",)),
        ("source", ("S",)),
        ("name", ("dog",)),
        ("safety", ("unsafe",)),
    )
    assert found.must_not == (("content", ("c",)), ("name", ("n",)))
    assert found.not_points == (point_of("x"),)


def test_an_empty_filter_asks_nothing() -> None:
    found = conditions(PairFilter())
    assert (found.must, found.must_not, found.not_points) == ((), (), ())


def test_embeddings_are_made_unit_length_and_bad_ones_are_refused() -> None:
    assert unit(np.array([3.0, 4.0]), 2).tolist() == pytest.approx([0.6, 0.8])
    for bad, why in (([1.0], "size 2"), ([0.0, 0.0], "length 0"), ([np.nan, 1.0], "length nan")):
        with pytest.raises(ValueError, match=why):
            unit(np.array(bad), 2)


def test_huge_embeddings_do_not_overflow() -> None:
    assert unit(np.array([3e30, 4e30], dtype=np.float32), 2).tolist() == pytest.approx([0.6, 0.8])


def test_a_page_of_changes_never_cuts_a_version_in_two() -> None:
    def page(*versions: int) -> list[Change]:
        return [Change(point=str(i), version=version, pair=None) for i, version in enumerate(versions)]

    def given(found: list[Change], **asked: int | bool) -> list[int]:
        return [change.version for change in whole_changes(found, **asked)]  # type: ignore[arg-type]

    assert given(page(1, 2, 3), since=1, limit=5, is_last=True) == [2, 3]
    assert given(page(1, 2, 3), since=1, limit=5, is_last=False) == [2]
    assert given(page(2, 3, 3, 3, 4), since=1, limit=2, is_last=True) == [2, 3, 3, 3]
    assert given(page(3, 3, 3), since=1, limit=2, is_last=False) == []


def test_tokens_are_points() -> None:
    assert is_point(point_of("a"))
    assert not is_point("a") and not is_point(point_of("a").upper()) and not is_point(point_of("a").replace("-", ""))


def test_each_level_keeps_a_quarter_those_with_the_least_ties() -> None:
    levels = {pair_id: payload_of(replace(PAIR, pair_id=pair_id))["level"] for pair_id in map(str, range(4000))}
    for level, about in ((1, 1000), (2, 250), (3, 62)):
        kept = {pair_id for pair_id, on in levels.items() if str(level) in on}
        assert abs(len(kept) - about) < 0.25 * about
        assert kept == {pair_id for pair_id in levels if tie_of(pair_id) < 2**64 // 4**level}
