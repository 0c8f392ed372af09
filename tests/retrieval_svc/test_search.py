"""Searches against plain oracles: legs, fusion, filters, exclusions, backfill, and the reason for fewer than k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.service.errors import FailedPrecondition, InvalidArgument
from retrieval_svc import candidates, legs, search
from retrieval_svc.fusion import maximal_marginal_relevance, tie_break
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.pairs import PairFilter, Scored, StoredPair
from retrieval_svc.retrieval import Method, Query, QueryWeights, Retrieval
from retrieval_svc.words import name_key
from tests.retrieval_svc.small_pairs import FakeEmbedder, make_picture, make_small, small_pairs

CAT_TWINS = {"noto--cat", "noto-v1--cat"}  # one picture, two ids


def _ids(retrieval: Retrieval) -> list[str]:
    return [neighbor.pair.pair_id for neighbor in retrieval.neighbors]


def _excluding(*pair_ids: str) -> PairFilter:
    return PairFilter(excluded_pair_ids=frozenset(pair_ids))


@pytest.fixture(scope="module")
def stored(knowledge_base: KnowledgeBase) -> dict[str, Scored]:
    """All pairs with their embeddings."""
    return knowledge_base.store.get([pair.pair_id for pair in small_pairs()], with_embeddings=True)


def _by_cosine(stored: Mapping[str, Scored], vector: np.ndarray, keep: Callable[[StoredPair], bool]) -> list[str]:
    """The CLIP leg, slow and plain; of the twins the one that comes first."""
    cosines = {i: float(s.embedding @ vector) for i, s in stored.items() if s.embedding is not None and keep(s.pair)}
    ranked = sorted(cosines, key=lambda i: -cosines[i])
    first = {stored[i].pair.content: i for i in reversed(ranked)}
    return [i for i in ranked if first[stored[i].pair.content] == i]


def _without_twins(pair_ids: list[str]) -> list[str]:
    return ["cat" if pair_id in CAT_TWINS else pair_id for pair_id in pair_ids]


def test_styles_and_scenes_are_not_entities(knowledge_base: KnowledgeBase) -> None:
    prompt = "guide dog, noto style, on a blue background"
    found = knowledge_base.retrieve(Query(prompt=prompt, k=3))
    assert {n.pair.entity for n in found.neighbors} == {"guide dog"}
    everything = knowledge_base.retrieve(Query(prompt=prompt, k=64))
    assert {n.pair.entity for n in everything.neighbors} == {"guide dog", "dog", "hot dog"}


def test_the_named_style_comes_first_among_equals(knowledge_base: KnowledgeBase) -> None:
    for style in ("noto", "twemoji", "openmoji"):
        found = knowledge_base.retrieve(Query(prompt=f"guide dog, {style} style"))
        assert _ids(found)[0] == f"{style}--guide-dog"


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
    assert _ids(knowledge_base.retrieve(Query(prompt=prompt)))[0] == first


@pytest.mark.parametrize("method", Method)
def test_the_exact_pair_can_be_left_out(knowledge_base: KnowledgeBase, method: Method) -> None:
    found = knowledge_base.retrieve(Query(prompt="a guide dog, noto style", k=64, method=method, exclude_exact=True))
    assert "noto--guide-dog" not in _ids(found)
    assert {"openmoji--guide-dog", "twemoji--guide-dog"} <= set(_ids(found))
    unnamed = knowledge_base.retrieve(Query(prompt="guide dog", k=64, method=method, exclude_exact=True))
    assert "noto--guide-dog" in _ids(unnamed), "no pair is exactly what a prompt without a style asks for"


@pytest.mark.parametrize("method", Method)
def test_leaving_out_a_pair_leaves_out_its_picture(knowledge_base: KnowledgeBase, method: Method) -> None:
    prompt = "cat, noto style"
    for query in (
        Query(prompt=prompt, k=64, method=method, exclude_exact=True),
        Query(prompt=prompt, k=64, method=method, filter=_excluding("noto--cat")),
    ):
        found = _ids(knowledge_base.retrieve(query))
        assert not CAT_TWINS & set(found) and "twemoji--cat" in found
    by_name = Query(prompt=prompt, k=64, method=method, excluded_entities=frozenset({"The CAT"}))
    assert "cat" not in {n.pair.entity for n in knowledge_base.retrieve(by_name).neighbors}


def test_duplicates_are_filled_up(knowledge_base: KnowledgeBase) -> None:
    found = knowledge_base.retrieve(Query(prompt="cat", k=4))
    assert {n.pair.entity for n in found.neighbors} == {"cat"}
    assert len({n.image for n in found.neighbors}) == 4 and len(CAT_TWINS & set(_ids(found))) == 1
    assert knowledge_base.retrieve(Query(prompt="cat", k=5)).neighbors[-1].pair.entity == "cat face"


def test_fewer_than_k_come_with_the_reason(knowledge_base: KnowledgeBase) -> None:
    assert knowledge_base.retrieve(Query(prompt="cat", k=5)).shortfall_reason == ""
    few = knowledge_base.retrieve(Query(prompt="cat", k=64, filter=_excluding("openmoji--cat")))
    assert few.shortfall_reason == (
        "asked for 64, found 4: no other pair shares a word with 'cat'; left out: 1 excluded, 1 duplicate"
    )
    none = knowledge_base.retrieve(Query(prompt="zeppelin, noto style"))
    assert none.neighbors == ()
    assert none.shortfall_reason == "asked for 2, found 0: no other pair shares a word with 'zeppelin'"
    safe = PairFilter(safe=True)
    clip = knowledge_base.retrieve(Query(prompt="cat", k=64, method=Method.CLIP, filter=safe))
    assert clip.shortfall_reason == (
        f"asked for 64, found {len(clip.neighbors)}: no other pair that the filter lets through has an embedding"
    )
    both = knowledge_base.retrieve(Query(prompt="cat", k=64, method=Method.HYBRID, near_duplicate_similarity=0.01))
    assert (
        "no other pair shares a word with 'cat' or has an embedding; left out: 1 duplicate, " in both.shortfall_reason
    )
    assert both.shortfall_reason.endswith(" nearly duplicate")


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize(
    ("filter", "keep"),
    [
        (
            PairFilter(facets={"style": frozenset({"noto", "openmoji"})}),
            lambda p: p.facets["style"] in ("noto", "openmoji"),
        ),
        (PairFilter(licenses=frozenset({"CC-BY-4.0", "CC0"})), lambda p: p.license == "CC-BY-4.0"),
        (PairFilter(sources=frozenset({"https://example.org"})), lambda p: p.source != ""),
        (PairFilter(safe=False), lambda p: not p.safe),
        (PairFilter(safe=True, facets={"style": frozenset({"twemoji"})}), lambda p: False),
    ],
)
def test_filters_are_applied_inside(
    knowledge_base: KnowledgeBase,
    stored: Mapping[str, Scored],
    method: Method,
    filter: PairFilter,
    keep: Callable[[StoredPair], bool],
) -> None:
    everything = knowledge_base.retrieve(Query(prompt="cat dog panda", k=64, method=method))
    expected = {s.pair.content for s in stored.values() if keep(s.pair)} & {
        n.pair.content for n in everything.neighbors
    }
    found = knowledge_base.retrieve(Query(prompt="cat dog panda", k=64, method=method, filter=filter))
    assert all(keep(n.pair) for n in found.neighbors)
    # One of the twins may pass where the other, which stood for both, does not.
    assert {n.pair.content for n in found.neighbors} >= expected
    assert len(found.neighbors) == len({n.pair.content for n in found.neighbors})


@pytest.mark.parametrize("k", [1, 5, 64])
def test_clip_against_every_cosine(knowledge_base: KnowledgeBase, stored: Mapping[str, Scored], k: int) -> None:
    vector = FakeEmbedder().texts(["zebra"])[0]
    query = Query(prompt="zebra", k=k, method=Method.CLIP, filter=PairFilter(safe=True))
    found = knowledge_base.retrieve(query)
    assert _ids(found) == _by_cosine(stored, vector, lambda pair: pair.safe)[:k]
    for rank, neighbor in enumerate(found.neighbors, start=1):
        cosine = float(stored[neighbor.pair.pair_id].embedding @ vector)  # type: ignore[operator]
        assert neighbor.score == pytest.approx(cosine, abs=1e-5)
        assert (neighbor.rank, neighbor.legs.keys()) == (rank, {Method.CLIP})
        assert (neighbor.legs[Method.CLIP].score, neighbor.legs[Method.CLIP].rank) == (neighbor.score, rank)


def test_the_query_vector_is_the_weighted_mix(knowledge_base: KnowledgeBase, stored: Mapping[str, Scored]) -> None:
    embedder = FakeEmbedder()
    text = embedder.texts(["zebra, noto style"])[0]
    image = stored["captioned"].embedding
    raw = np.linspace(-9, 50, 8).astype(np.float32)
    mixed = 0.5 * text + 2.0 * image + 1.25 * raw / np.linalg.norm(raw)  # type: ignore[operator]
    query = Query(
        prompt="zebra, noto style",
        image=make_picture(2000),
        embedding=raw,
        weights=QueryWeights(text=0.5, image=2.0, embedding=1.25),
        k=64,
        method=Method.CLIP,
    )
    found = knowledge_base.retrieve(query)
    expected = _by_cosine(stored, mixed / np.linalg.norm(mixed), lambda _: True)
    assert _without_twins(_ids(found)) == _without_twins(expected)
    assert found.neighbors[0].score == pytest.approx(
        float(stored[expected[0]].embedding @ mixed / np.linalg.norm(mixed)),
        abs=1e-5,  # type: ignore[operator]
    )


@pytest.mark.parametrize("prompt", ["cat", "guide dog, noto style", "blue things", "zeppelin"])
@pytest.mark.parametrize("k", [2, 7, 64])
def test_hybrid_is_the_fusion_of_both_legs(
    knowledge_base: KnowledgeBase, stored: Mapping[str, Scored], prompt: str, k: int
) -> None:
    """All pairs fit into the depth of a leg, so that both rankings are whole."""
    words = _ids(knowledge_base.retrieve(Query(prompt=prompt, k=64)))
    looks = _by_cosine(stored, FakeEmbedder().texts([prompt])[0], lambda _: True)
    assert len(stored) <= search.MIN_DEPTH
    ranks: dict[str, dict[Method, int]] = {}
    for method, ranking in ((Method.BM25, words), (Method.CLIP, looks)):
        for rank, pair_id in enumerate(_without_twins(ranking), start=1):
            ranks.setdefault(pair_id, {})[method] = rank
    found = knowledge_base.retrieve(Query(prompt=prompt, k=k, method=Method.HYBRID))
    names = dict(zip(_without_twins(_ids(found)), _ids(found), strict=True))
    scores = {i: math.fsum(1 / (60 + rank) for rank in places.values()) for i, places in ranks.items()}
    expected = sorted(scores, key=lambda i: (-scores[i], tie_break(names.get(i, i))))[:k]
    assert list(names) == expected
    for neighbor, pair_id in zip(found.neighbors, expected, strict=True):
        assert neighbor.score == pytest.approx(scores[pair_id], abs=1e-12)
        assert {method: leg.rank for method, leg in neighbor.legs.items()} == ranks[pair_id]
    assert len(found.neighbors) == min(k, len(stored) - 1) and not found.failed_legs


def test_one_picture_under_two_ids_is_one_and_named_by_the_better() -> None:
    def scored(pair_id: str, content: str) -> Scored:
        return Scored(pair=StoredPair(pair_id=pair_id, caption="", entity="", image_sha256=content), score=1.0)

    words = [scored("other", "x"), scored("twin-a", "same")]
    looks = [scored("twin-b", "same"), scored("third", "y")]
    fused = candidates.fused({Method.BM25: words, Method.CLIP: looks})
    assert next(iter(fused)) == "twin-b" and "twin-a" not in fused and len(fused) == 3
    assert fused["twin-b"].score == pytest.approx(1 / 62 + 1 / 61)
    assert fused["twin-b"].places == {Method.BM25: 1, Method.CLIP: 0}


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.9])
def test_near_duplicates_are_filled_up(
    knowledge_base: KnowledgeBase, stored: Mapping[str, Scored], method: Method, similarity: float
) -> None:
    def embedding(pair_id: str) -> np.ndarray:
        vector = stored[pair_id].embedding
        assert vector is not None
        return vector

    everything = _ids(knowledge_base.retrieve(Query(prompt="cat dog blue", k=64, method=method)))
    kept: list[str] = []
    for pair_id in everything:
        if all(float(embedding(pair_id) @ embedding(other)) < similarity for other in kept):
            kept.append(pair_id)
    query = Query(prompt="cat dog blue", k=4, method=method, near_duplicate_similarity=similarity)
    found = knowledge_base.retrieve(query)
    assert _ids(found) == kept[:4]
    assert (found.shortfall_reason == "") == (len(kept) >= 4)


def test_diversity_chooses_by_marginal_relevance(knowledge_base: KnowledgeBase, stored: Mapping[str, Scored]) -> None:
    everything = _ids(knowledge_base.retrieve(Query(prompt="cat dog", k=64, method=Method.HYBRID)))
    vectors = {i: s.embedding for i, s in stored.items() if s.embedding is not None}
    expected = maximal_marginal_relevance(everything, vectors, diversity=0.6, k=5)
    found = knowledge_base.retrieve(Query(prompt="cat dog", k=5, method=Method.HYBRID, diversity=0.6))
    assert _ids(found) == expected != everything[:5]
    assert [n.rank for n in found.neighbors] == [1, 2, 3, 4, 5]


def test_the_callers_faults_are_no_failed_leg(knowledge_base: KnowledgeBase) -> None:
    with pytest.raises(InvalidArgument, match="query_image: "):
        knowledge_base.retrieve(Query(prompt="dog", image=b"no picture", method=Method.HYBRID))
    opposite = -FakeEmbedder().texts(["dog"])[0]
    with pytest.raises(InvalidArgument, match=r"query_weights: .* cancel each other out"):
        knowledge_base.retrieve(Query(prompt="dog", embedding=opposite, method=Method.HYBRID))


def test_an_approximate_search_that_misses_pairs_is_made_up_for(
    knowledge_base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = knowledge_base.store.nearest
    query = Query(prompt="guide dog", k=20, method=Method.CLIP)
    expected = _ids(knowledge_base.retrieve(query))

    def forgetful(*arguments: object, exact: bool = False, **options: object) -> list[Scored]:
        found = nearest(*arguments, exact=exact, **options)  # type: ignore[arg-type]
        return found if exact else found[::2]

    monkeypatch.setattr(knowledge_base.store, "nearest", forgetful)
    assert _ids(knowledge_base.retrieve(query)) == expected and len(expected) == 20


def test_nobody_looks_further_than_the_limit(knowledge_base: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (legs, search):
        monkeypatch.setattr(module, "MAX_CANDIDATES", 6)
    query = Query(prompt="dog", k=4, method=Method.CLIP, near_duplicate_similarity=1e-6)
    found = knowledge_base.retrieve(query)
    assert len(found.neighbors) < 4
    assert f"found {len(found.neighbors)}: no other pair among the best 6; left out: " in found.shortfall_reason


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBase]:
    """One without embeddings."""
    folder: Path = tmp_path_factory.mktemp("bare") / "bare"
    with closing(make_small(folder, embedding_size=0, pairs=small_pairs()[:3])) as opened:
        yield opened


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (Query(prompt="dog", k=0), "k: 0 is not between 1 and 64"),
        (Query(prompt="dog", k=65), "k: 65 is not between 1 and 64"),
        (Query(prompt="dog", diversity=1.1), "diversity: 1.1 "),
        (Query(prompt="dog", diversity=math.nan), "diversity: nan "),
        (Query(prompt="dog", near_duplicate_similarity=-0.1), "near_duplicate_similarity: -0.1 "),
        (Query(prompt="dog", filter=_excluding(*map(str, range(1001)))), "excluded_pair_ids: holds 1001 ids"),
        (
            Query(prompt="dog", excluded_entities=frozenset(map(str, range(1001)))),
            "excluded_entities: holds 1001 names",
        ),
        (Query(prompt="dog", weights=QueryWeights(text=-1)), "query_weights.text: -1 "),
        (Query(prompt="dog", weights=QueryWeights(image=math.inf)), "query_weights.image: inf "),
        (Query(prompt="dog", weights=QueryWeights(embedding=math.nan)), "query_weights.embedding: nan "),
        (
            Query(prompt="dog", weights=QueryWeights(text=0), method=Method.CLIP),
            "query_weights: all parts that are given",
        ),
        (Query(prompt=" "), "prompt: is empty"),
        (Query(method=Method.HYBRID, embedding=np.ones(8)), "prompt: is empty"),
        (Query(method=Method.CLIP, prompt="\n"), "prompt: is empty, and neither"),
        (Query(method=Method.CLIP, prompt="noto style"), "prompt: 'noto style' names no entity"),
        (Query(prompt="dog", image=b"x"), "query_image: method BM25 looks for words alone"),
        (Query(prompt="dog", embedding=np.ones(8)), "query_embedding: method BM25 looks for words alone"),
        (Query(method=Method.CLIP, embedding=np.ones(9)), "query_embedding: has 9 numbers"),
        (Query(method=Method.CLIP, embedding=np.zeros(8)), "query_embedding: has norm 0.0"),
        (Query(method=Method.CLIP, embedding=np.array([np.nan] * 8)), "query_embedding: has norm nan"),
    ],
)
def test_what_cannot_be_asked(knowledge_base: KnowledgeBase, query: Query, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        knowledge_base.retrieve(query)
    assert str(raised.value).startswith(field)


def test_without_embeddings_only_words_are_looked_for(bare: KnowledgeBase) -> None:
    assert len(_ids(bare.retrieve(Query(prompt="guide dog", k=3)))) == 3
    for method in (Method.CLIP, Method.HYBRID):
        with pytest.raises(FailedPrecondition, match=f"method {method.name}: .*'bare' has no CLIP index"):
            bare.retrieve(Query(prompt="dog", method=method))
    for query, field in ((Query(prompt="dog", diversity=0.1), "diversity"),):
        with pytest.raises(FailedPrecondition, match=f"{field}: knowledge base 'bare' has no embeddings"):
            bare.retrieve(query)


def test_names_are_compared_like_the_index_does() -> None:
    assert name_key("The  CAT!") == name_key("cat")
