"""gamma(p, B): the right entity, honest exclusions, no picture twice, the reason for fewer than k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.corpus import iter_pairs
from common.service.errors import FailedPrecondition, InvalidArgument
from retrieval_svc.index_build import build_index
from retrieval_svc.knowledge_base import KnowledgeBase, Method, Retrieval


def _ids(retrieval: Retrieval) -> list[str]:
    return [neighbor.pair_id for neighbor in retrieval.neighbors]


def test_styles_and_scenes_are_not_entities(knowledge_base: KnowledgeBase) -> None:
    found = knowledge_base.retrieve("guide dog, noto style, on a blue background", k=3)
    assert {neighbor.entity for neighbor in found.neighbors} == {"guide dog"}
    everything = knowledge_base.retrieve("guide dog, noto style, on a blue background", k=64)
    assert not [n.entity for n in everything.neighbors if "blue" in n.entity or "background" in n.entity]
    assert {n.entity for n in everything.neighbors} == {"guide dog", "dog", "hot dog"}


def test_a_neighbor_is_the_stored_pair(knowledge_base: KnowledgeBase, corpus: Path) -> None:
    stored = {pair.key: pair for pair in iter_pairs(corpus)}
    (best,) = knowledge_base.retrieve("guide dog, twemoji style", k=1).neighbors
    pair = stored["twemoji--guide-dog"]
    assert best.pair_id == pair.key
    assert (best.image, best.image_format, best.caption) == (pair.image, "png", pair.caption)
    assert (best.author, best.source, best.license) == (
        "author of twemoji",
        "https://example.org",
        "CC-BY-4.0",
    )
    assert (best.facets, best.rank, best.entity) == ({"style": "twemoji"}, 1, "guide dog")
    assert best.score > 0


def test_the_named_style_comes_first_among_equals(knowledge_base: KnowledgeBase) -> None:
    for style in ("noto", "twemoji", "openmoji"):
        assert _ids(knowledge_base.retrieve(f"guide dog, {style} style"))[0] == f"{style}--guide-dog"


def test_the_exact_pair_can_be_left_out(knowledge_base: KnowledgeBase) -> None:
    found = knowledge_base.retrieve("a guide dog, noto style", exclude_exact=True)
    assert sorted(_ids(found)) == ["openmoji--guide-dog", "twemoji--guide-dog"]
    unnamed = knowledge_base.retrieve("guide dog", k=3, exclude_exact=True)
    assert len(_ids(unnamed)) == 3, "no pair is exactly what a prompt without a style asks for"


def test_leaving_out_a_pair_leaves_out_its_picture(knowledge_base: KnowledgeBase) -> None:
    exact = knowledge_base.retrieve("cat, noto style", k=64, exclude_exact=True)
    by_id = knowledge_base.retrieve("cat, noto style", k=64, excluded_pair_ids=frozenset({"noto--cat"}))
    for found in (exact, by_id):
        assert not {"noto--cat", "noto-v1--cat"} & set(_ids(found))
        assert "twemoji--cat" in _ids(found)


def test_duplicates_are_filled_up(knowledge_base: KnowledgeBase) -> None:
    found = knowledge_base.retrieve("cat", k=4)
    assert {n.entity for n in found.neighbors} == {"cat"}
    assert len({n.image for n in found.neighbors}) == 4
    assert len({"noto--cat", "noto-v1--cat"} & set(_ids(found))) == 1
    assert knowledge_base.retrieve("cat", k=5).neighbors[-1].entity == "cat face"


def test_fewer_than_k_come_with_the_reason(knowledge_base: KnowledgeBase) -> None:
    assert knowledge_base.retrieve("cat", k=5).shortfall_reason == ""
    few = knowledge_base.retrieve("cat", k=64, excluded_pair_ids=frozenset({"openmoji--cat"}))
    assert len(few.neighbors) == 4
    assert few.shortfall_reason == (
        "asked for 64, found 4: no other pair shares a word with 'cat'; left out: 1 excluded, 1 duplicate"
    )
    none = knowledge_base.retrieve("zeppelin, noto style")
    assert none.neighbors == ()
    assert none.shortfall_reason == "asked for 2, found 0: no other pair shares a word with 'zeppelin'"


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("flag for Côte d'Ivoire, noto style", "noto--flag-for-cote-divoire"),
        ("1st place medal, twemoji style", "twemoji--1st-place-medal"),
        ("an old style house, openmoji style", "openmoji--old-style-house"),
        ("A button (blood type), noto style", "noto--a-button-blood-type"),
        ("university", "noto--university"),
        ("universal remote", "noto--universal-remote"),
        ("red panda, noto style", "captioned"),
        ("guide dogs, openmoji style", "openmoji--guide-dog"),
    ],
)
def test_names_are_found(knowledge_base: KnowledgeBase, prompt: str, first: str) -> None:
    assert _ids(knowledge_base.retrieve(prompt))[0] == first


def test_a_pair_with_a_caption_alone_is_understood(knowledge_base: KnowledgeBase) -> None:
    (pair,) = knowledge_base.retrieve("red panda", k=1).neighbors
    assert (pair.entity, pair.facets) == ("red panda", {"style": "noto"})
    assert _ids(knowledge_base.retrieve("red panda, noto style", exclude_exact=True)) == []


def test_the_order_does_not_depend_on_the_order_of_the_corpus(
    tmp_path: Path, corpus: Path, knowledge_base: KnowledgeBase, write_small_corpus: Callable[..., Path]
) -> None:
    backward = write_small_corpus(tmp_path / "corpus", list(iter_pairs(corpus))[::-1])
    build_index(backward, tmp_path / "index", lambda done, total: None)
    other = KnowledgeBase.open(tmp_path / "index")
    for prompt in ("dog", "guide dog", "cat", "blue things", "noto cat style house"):
        assert _ids(other.retrieve(prompt, k=10)) == _ids(knowledge_base.retrieve(prompt, k=10))


@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_out_of_range(knowledge_base: KnowledgeBase, k: int) -> None:
    with pytest.raises(InvalidArgument, match=f"k: {k} is not between 1 and 64"):
        knowledge_base.retrieve("dog", k=k)


def test_limits_and_methods(knowledge_base: KnowledgeBase) -> None:
    with pytest.raises(InvalidArgument, match="excluded_pair_ids: holds 1001 ids"):
        knowledge_base.retrieve("dog", excluded_pair_ids=frozenset(map(str, range(1001))))
    for method in (Method.CLIP, Method.HYBRID):
        with pytest.raises(FailedPrecondition, match="'small' has no CLIP index"):
            knowledge_base.retrieve("dog", method=method)
