"""Searches whose legs fail, or whose pairs change between being found and being read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.service.errors import Unavailable
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.pairs import Scored
from retrieval_svc.retrieval import Method, Query, QueryWeights, Retrieval
from tests.retrieval_svc.small_pairs import make_picture


def _ids(retrieval: Retrieval) -> list[str]:
    return [neighbor.pair.pair_id for neighbor in retrieval.neighbors]


def _broken(*_: object, **__: object) -> list[Scored]:
    raise RuntimeError("secret path")


def test_one_leg_down_the_other_answers(knowledge_base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    query = Query(prompt="guide dog", k=3, method=Method.HYBRID)
    with monkeypatch.context() as patched:
        for search_of_the_store in ("nearest", "nearest_briefs"):
            patched.setattr(knowledge_base.store, search_of_the_store, _broken)
        found = knowledge_base.retrieve(query)
        assert found.failed_legs == {Method.CLIP: "internal error (RuntimeError)"}
        assert _ids(found) == _ids(knowledge_base.retrieve(Query(prompt="guide dog", k=3)))
        assert found.neighbors[0].score == pytest.approx(1 / 61) and found.method is Method.HYBRID
        with pytest.raises(RuntimeError):
            knowledge_base.retrieve(Query(prompt="guide dog", method=Method.CLIP))
        patched.setattr(knowledge_base._lexical, "search", _broken)
        with pytest.raises(Unavailable, match=r"BM25: internal error .*; CLIP: internal error") as raised:
            knowledge_base.retrieve(query)
        assert "secret" not in raised.value.description
    with monkeypatch.context() as patched:
        patched.setattr(knowledge_base._lexical, "search", _broken)
        found = knowledge_base.retrieve(query)
        assert found.failed_legs.keys() == {Method.BM25}
        assert _ids(found) == _ids(knowledge_base.retrieve(Query(prompt="guide dog", k=3, method=Method.CLIP)))
    assert knowledge_base.retrieve(query).failed_legs == {}


def test_a_pair_that_changes_before_it_is_read_is_looked_up_again(
    knowledge_base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HYBRID reads only what it gives back: what was replaced or deleted in between is not given back as it was found."""
    query = Query(prompt="nothing", image=make_picture(3), weights=QueryWeights(text=0), k=5, method=Method.HYBRID)
    expected = knowledge_base.retrieve(query)
    assert len(expected.neighbors) == 5
    read, num_reads = knowledge_base.store.get, 0

    def changed_once(pair_ids: list[str], **options: bool) -> dict[str, Scored]:
        nonlocal num_reads
        num_reads += 1
        whole = read(pair_ids, **options)
        if num_reads == 1:
            del whole[pair_ids[0]]
        if num_reads == 2:
            whole[pair_ids[1]] = replace(whole[pair_ids[1]], pair=replace(whole[pair_ids[1]].pair, version=1))
        return whole

    monkeypatch.setattr(knowledge_base.store, "get", changed_once)
    found = knowledge_base.retrieve(query)
    assert found.neighbors == expected.neighbors and num_reads == 3
    monkeypatch.setattr(knowledge_base.store, "get", _broken)
    found = knowledge_base.retrieve(replace(query, prompt="guide dog"))
    assert found.failed_legs.keys() == {Method.CLIP} and _ids(found) == _ids(
        knowledge_base.retrieve(Query(prompt="guide dog", k=5))
    )
