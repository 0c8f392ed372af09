"""The typed client against a real retrieval service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from client.knowledge_base import BATCH_PAIRS, KnowledgeBases, RetrievalFailed
from client.retrieval_types import FacetSpec, Filter, Lookup, Pair
from tests.retrieval_svc.serving import EMBEDDING_SIZE, hosted, picture, vector

NUM_PAIRS = 150
FACET = FacetSpec(name="style", template="{value} style", values=("noto", "twemoji"))


def make_pair(number: int) -> Pair:
    """A pair; another for each number."""
    return Pair(
        pair_id=f"p-{number:03}",
        caption=f"creature {number}, noto style",
        entity=f"creature {number}",
        image=picture(number),
        facets={"style": "noto" if number % 3 else "twemoji"},
        license="CC0-1.0",
        safe=bool(number % 2),
        attributes={"number": str(number)},
        embedding=tuple(vector(number)),
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBases]:
    """A client of a service that has one knowledge base with 150 pairs."""
    folder = tmp_path_factory.mktemp("client")
    with hosted(folder / "data", snapshots=folder / "snapshots") as service, KnowledgeBases(service.address) as client:
        made = client.create("zoo", facets=[FACET], scene_phrases=["at night"], embedding_size=EMBEDDING_SIZE)
        assert (made.name, made.facets, made.scene_phrases) == ("zoo", (FACET,), ("at night",))
        outcomes = list(client.upsert("zoo", map(make_pair, range(NUM_PAIRS))))
        assert [o.pair_id for o in outcomes] == [f"p-{n:03}" for n in range(NUM_PAIRS)]
        assert {o.outcome for o in outcomes} == {"created"}
        yield client


def test_batches_are_sent_as_outcomes_are_asked_for(bases: KnowledgeBases) -> None:
    taken = 0

    def endless() -> Iterator[Pair]:
        nonlocal taken
        while True:
            taken += 1
            yield make_pair(taken % NUM_PAIRS)

    outcomes = bases.upsert("zoo", endless())
    assert taken == 0
    assert next(outcomes).outcome == "unchanged"
    assert taken == BATCH_PAIRS + 1, "one is read ahead to see that the batch is full"


def test_what_is_refused_is_said(bases: KnowledgeBases) -> None:
    (rejected,) = bases.upsert("zoo", [replace(make_pair(1), pair_id="bad", image=b"no picture")])
    assert (rejected.outcome, rejected.field) == ("rejected", "image") and rejected.reason
    with pytest.raises(RetrievalFailed) as caught:
        bases.create("Zoo")
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "FIELD_INVALID")
    assert [v.field for v in caught.value.violations] == ["name"]
    with pytest.raises(RetrievalFailed, match="NOT_FOUND"):
        bases.get("zoo", "nobody")
    with pytest.raises(ValueError, match="method: 'word2vec' is not one of bm25, clip, hybrid"):
        bases.retrieve(Lookup(prompt="creature", method="word2vec"))


def test_get_and_list(bases: KnowledgeBases) -> None:
    whole = bases.get("zoo", "p-004", include_embedding=True)
    assert (whole.image, whole.image_format, whole.attributes) == (picture(4), "png", {"number": "4"})
    assert (len(whole.embedding), whole.version > 0, len(whole.image_sha256)) == (EMBEDDING_SIZE, True, 64)
    assert [base.name for base in bases.list()] == ["zoo"]
    assert {pair.pair_id for pair in bases.list_pairs("zoo", page_size=40)} == {f"p-{n:03}" for n in range(NUM_PAIRS)}
    wanted = Filter(facets={"style": ["twemoji"]}, licenses=("CC0-1.0",), safe=False)
    assert {int(p.attributes["number"]) % 6 for p in bases.list_pairs("zoo", filter=wanted)} == {0}


def test_retrieve(bases: KnowledgeBases) -> None:
    lookup = Lookup(
        prompt="creature 7",
        k=3,
        method="hybrid",
        embedding=tuple(vector(7)),
        weights=(0.0, 0.0, 1.0),
        excluded_pair_ids=("p-008",),
        filter=Filter(facets={"style": ["noto"]}),
        include_embeddings=True,
    )
    found = bases.retrieve(lookup)
    first = found.neighbors[0]
    assert (first.pair.pair_id, first.rank, first.pair.image) == ("p-007", 1, picture(7))
    assert (first.legs["bm25"].rank, first.legs["clip"].rank, len(first.pair.embedding)) == (1, 1, EMBEDDING_SIZE)
    assert {n.pair.facets["style"] for n in found.neighbors} == {"noto"}
    assert (found.knowledge_base, found.method, found.failed_legs, found.shortfall_reason) == ("zoo", "hybrid", {}, "")


def test_stats_snapshot_and_delete(bases: KnowledgeBases) -> None:
    assert bases.delete_pairs("zoo", [f"p-{n:03}" for n in range(140, 2000)]) == 10
    stats = bases.stats("zoo")
    assert (stats.num_pairs, stats.num_embeddings, stats.num_images) == (140, 140, 140)
    assert stats.knowledge_base.embedding_size == EMBEDDING_SIZE
    snapshot = bases.snapshot("zoo")
    assert (snapshot.num_pairs, snapshot.generation, Path(snapshot.path).is_dir()) == (
        140,
        stats.stored_generation,
        True,
    )
    bases.delete("zoo")
    assert list(bases.list()) == []
