"""KnowledgeBaseService over real sockets: every RPC, what it refuses, and that changes are seen at once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2

from client.errors import reason, violations
from tests.retrieval_svc.serving import (
    EMBEDDING_SIZE,
    STYLES,
    TIMEOUT_S,
    Client,
    caught_up,
    fill,
    hosted,
    make_pairs,
    picture,
    refusal,
    vector,
)

CREATED, REPLACED = pb.UpsertResult.OUTCOME_CREATED, pb.UpsertResult.OUTCOME_REPLACED
UNCHANGED, REJECTED = pb.UpsertResult.OUTCOME_UNCHANGED, pb.UpsertResult.OUTCOME_REJECTED
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the service's data and its snapshots are."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    """A service with the knowledge base "small"."""
    with hosted(folder / "data", snapshots=folder / "snapshots") as running:
        fill(running)
        caught_up(running)
        yield running


def _upsert(client: Client, *pairs: pb.NewPair, name: str = "small") -> pb.UpsertPairsResponse:
    return client.bases.UpsertPairs(pb.UpsertPairsRequest(knowledge_base=name, pairs=pairs), timeout=TIMEOUT_S)


def _pair(pair_id: str, **fields: Any) -> pb.NewPair:
    whole: dict[str, Any] = {"caption": f"a {pair_id}", "image": picture(5000), "embedding": vector(77), **fields}
    return pb.NewPair(pair_id=pair_id, **whole)


def _facet_with(alike: dict[str, list[str]]) -> pb.Facet:
    wanted = {value: retrieval_pb2.Values(values=others) for value, others in alike.items()}
    return pb.Facet(name="style", template="{value} style", values=["noto", "b"], alike=wanted)


def test_pairs_of_a_style_that_looks_alike_stand_in_for_the_one_that_is_asked_for(client: Client) -> None:
    styles = ("noto", "a", "b", "c", "d")
    facet = pb.Facet(name="style", template="{value} style", values=styles)
    facet.alike["noto"].values.extend(["d", "b"])
    client.bases.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(name="alike", facets=[facet]), timeout=TIMEOUT_S)
    pairs = [
        _pair(f"dog-{style}", caption=f"guide dog, {style} style", embedding=[], image=picture(5100 + n))
        for n, style in enumerate(styles)
    ]
    _upsert(client, *pairs, name="alike")
    asked = retrieval_pb2.RetrieveRequest(
        prompt="a guide dog, noto style", knowledge_base="alike", k=3, method=retrieval_pb2.METHOD_BM25
    )
    caught_up(client, "alike")
    for exact, expected in ((False, ["noto"]), (True, ["d", "b"])):
        asked.exclude_exact = exact
        given = client.retrieval.Retrieve(asked, timeout=TIMEOUT_S).neighbors
        assert [neighbor.facets["style"] for neighbor in given][: len(expected)] == expected
    client.bases.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(name="alike"), timeout=TIMEOUT_S)


def test_create_list_stats_delete(client: Client) -> None:
    alike = {STYLES[0]: retrieval_pb2.Values(values=STYLES[:0:-1])}
    facet = pb.Facet(name="style", template="{value} style", values=STYLES, alike=alike)
    create = pb.CreateKnowledgeBaseRequest(name="made", facets=[facet], scene_phrases=["at night"], embedding_size=4)
    made = client.bases.CreateKnowledgeBase(create, timeout=TIMEOUT_S).knowledge_base
    assert (made.name, made.embedding_size, made.embedding_model) == ("made", 4, "")
    assert (list(made.facets), list(made.scene_phrases)) == ([facet], ["at night"])
    assert made.created_at.startswith("20")
    again = refusal(client.bases.CreateKnowledgeBase, create)
    assert (again.code(), reason(again)) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")

    first = client.bases.ListKnowledgeBases(pb.ListKnowledgeBasesRequest(page_size=1), timeout=TIMEOUT_S)
    rest = pb.ListKnowledgeBasesRequest(page_size=1000, page_token=first.next_page_token)
    second = client.bases.ListKnowledgeBases(rest, timeout=TIMEOUT_S)
    assert [k.name for k in (*first.knowledge_bases, *second.knowledge_bases)] == ["made", "small"]
    assert second.next_page_token == ""

    client.bases.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(name="made"), timeout=TIMEOUT_S)
    for call, request in (
        (client.bases.DeleteKnowledgeBase, pb.DeleteKnowledgeBaseRequest(name="made")),
        (client.bases.GetKnowledgeBaseStats, pb.GetKnowledgeBaseStatsRequest(knowledge_base="made")),
        (client.retrieval.Retrieve, retrieval_pb2.RetrieveRequest(prompt="dog", knowledge_base="made")),
    ):
        assert refusal(call, request).code() == MISSING


def test_stats(client: Client) -> None:
    stats = client.bases.GetKnowledgeBaseStats(
        pb.GetKnowledgeBaseStatsRequest(knowledge_base="small"), timeout=TIMEOUT_S
    )
    assert (stats.num_pairs, stats.num_embeddings, stats.num_indexed_pairs, stats.num_images) == (10, 10, 10, 10)
    assert stats.disk_bytes > stats.image_bytes > 500
    assert stats.stored_generation == stats.index_generation > 1e18
    assert stats.knowledge_base.embedding_size == EMBEDDING_SIZE


def test_outcomes_of_an_upsert(client: Client) -> None:
    good = _pair("good")
    bad = [
        _pair("no caption", caption=""),
        _pair("no picture", image=b""),
        _pair("not a picture", image=b"GIF89a, but no more"),
        _pair("nul", caption="a\0b"),
        _pair("nan", embedding=[math.nan] * EMBEDDING_SIZE),
        _pair("inf", embedding=[math.inf] * EMBEDDING_SIZE),
        _pair("size", embedding=[1.0] * 3),
        _pair(""),
        _pair("x" * 201),
        _pair("\0"),
    ]
    response = _upsert(client, good, *bad)
    outcomes = [result.outcome for result in response.results]
    assert outcomes == [CREATED] + [REJECTED] * len(bad), response
    assert [r.field for r in response.results[1:]] == [
        "caption",
        "image",
        "image",
        "caption",
        "embedding",
        "embedding",
        "embedding",
        "pair_id",
        "pair_id",
        "pair_id",
    ]
    assert all(r.reason for r in response.results[1:])
    assert [r.outcome for r in _upsert(client, good).results] == [UNCHANGED]
    assert [r.outcome for r in _upsert(client, _pair("good", author="somebody")).results] == [REPLACED]
    got = client.bases.GetPair(
        pb.GetPairRequest(knowledge_base="small", pair_id="good", include_image=True, include_embedding=True),
        timeout=TIMEOUT_S,
    ).pair
    assert (got.caption, got.author, got.image, len(got.embedding)) == ("a good", "somebody", picture(5000), 8)
    assert client.figure("reimagen_retrieval_changed_pairs_total", outcome="rejected") >= len(bad)
    client.bases.DeletePairs(pb.DeletePairsRequest(knowledge_base="small", pair_ids=["good"]), timeout=TIMEOUT_S)


def test_a_knowledge_base_without_embeddings_gives_its_pairs_without(client: Client) -> None:
    """Also to callers who ask for them: of one pair, and of neighbors."""
    client.bases.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(name="words"), timeout=TIMEOUT_S)
    try:
        (stored,) = _upsert(client, _pair("dog", embedding=[]), name="words").results
        assert stored.outcome == CREATED
        request = pb.GetPairRequest(knowledge_base="words", pair_id="dog", include_embedding=True)
        pair = client.bases.GetPair(request, timeout=TIMEOUT_S).pair
        assert (pair.caption, list(pair.embedding)) == ("a dog", [])
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := client.retrieve("a dog", knowledge_base="words", include_embeddings=True).neighbors):
            assert time.monotonic() < deadline
        assert [(neighbor.pair_id, list(neighbor.embedding)) for neighbor in found] == [("dog", [])]
    finally:
        client.bases.DeleteKnowledgeBase(pb.DeleteKnowledgeBaseRequest(name="words"), timeout=TIMEOUT_S)


def test_a_change_is_seen_within_a_second_and_a_delete_at_once(client: Client) -> None:
    for number in range(5):
        name = f"chortai {number}"
        pair = _pair(f"c-{number}", caption=name, image=picture(6000 + number), embedding=vector(600 + number))
        generation = _upsert(client, pair).generation
        stored = time.monotonic()
        while not (found := client.retrieve(name, knowledge_base="small", k=1)).neighbors or (
            found.neighbors[0].pair_id != f"c-{number}"
        ):
            assert time.monotonic() - stored < 1.0
        assert found.index_generation >= generation
        delete = pb.DeletePairsRequest(knowledge_base="small", pair_ids=[f"c-{number}", "nobody"])
        gone = client.bases.DeletePairs(delete, timeout=TIMEOUT_S)
        assert (gone.num_deleted, gone.generation > generation) == (1, True)
        for fields in (
            {"prompt": name},
            {"method": retrieval_pb2.METHOD_CLIP, "query_embedding": vector(600 + number)},
        ):
            left = client.retrieve(knowledge_base="small", k=64, **fields)
            assert f"c-{number}" not in [n.pair_id for n in left.neighbors]
        assert refusal(client.bases.GetPair, _get(f"c-{number}")).code() == MISSING


def _get(pair_id: str) -> pb.GetPairRequest:
    return pb.GetPairRequest(knowledge_base="small", pair_id=pair_id)


def test_pages_and_filters(client: Client) -> None:
    def listed(**fields: Any) -> list[pb.StoredPair]:
        pairs, token = list[pb.StoredPair](), ""
        while True:
            request = pb.ListPairsRequest(knowledge_base="small", page_token=token, **fields)
            page = client.bases.ListPairs(request, timeout=TIMEOUT_S)
            pairs += page.pairs
            token = page.next_page_token
            if not token:
                return pairs

    whole = listed()
    assert sorted(p.pair_id for p in whole) == sorted(p.pair_id for p in make_pairs())
    assert all(not p.image and not p.embedding and p.image_sha256 and p.version for p in whole)
    assert [p.pair_id for p in listed(page_size=3)] == [p.pair_id for p in whole]
    safe = listed(filter=retrieval_pb2.Filter(safe=True))
    assert {p.facets["style"] for p in safe} == {"noto"} and len(safe) == 5
    refused = refusal(client.bases.ListPairs, pb.ListPairsRequest(knowledge_base="small", page_token="nonsense"))
    assert [v.field for v in violations(refused)] == ["page_token"]


def test_snapshot(client: Client, folder: Path) -> None:
    made = client.bases.CreateSnapshot(pb.CreateSnapshotRequest(knowledge_base="small"), timeout=TIMEOUT_S)
    assert Path(made.path).is_relative_to(folder / "snapshots")
    assert (made.num_pairs, made.generation > 0, made.num_bytes > 1000) == (10, True, True)
    assert json.loads((Path(made.path) / "snapshot.json").read_text())


@pytest.mark.parametrize(
    ("method", "request_message", "code", "field"),
    [
        ("CreateKnowledgeBase", pb.CreateKnowledgeBaseRequest(), INVALID, "name"),
        ("CreateKnowledgeBase", pb.CreateKnowledgeBaseRequest(name="Small"), INVALID, "name"),
        ("CreateKnowledgeBase", pb.CreateKnowledgeBaseRequest(name="../up"), INVALID, "name"),
        ("CreateKnowledgeBase", pb.CreateKnowledgeBaseRequest(name="a\0"), INVALID, "name"),
        ("CreateKnowledgeBase", pb.CreateKnowledgeBaseRequest(name="x" * 64), INVALID, "name"),
        (
            "CreateKnowledgeBase",
            pb.CreateKnowledgeBaseRequest(name="x", embedding_size=10**9),
            INVALID,
            "embedding_size",
        ),
        (
            "CreateKnowledgeBase",
            pb.CreateKnowledgeBaseRequest(name="x", facets=[pb.Facet(name="style", template="no slot")]),
            INVALID,
            "facets",
        ),
        *(
            (
                "CreateKnowledgeBase",
                pb.CreateKnowledgeBaseRequest(name="x", facets=[_facet_with({value: others})]),
                INVALID,
                "facets",
            )
            for value, others in (("noto", ["other"]), ("other", ["noto"]), ("noto", ["noto"]), ("noto", ["b", "b"]))
        ),
        ("DeleteKnowledgeBase", pb.DeleteKnowledgeBaseRequest(), INVALID, "name"),
        ("DeleteKnowledgeBase", pb.DeleteKnowledgeBaseRequest(name="../small"), MISSING, ""),
        ("ListKnowledgeBases", pb.ListKnowledgeBasesRequest(page_size=1001), INVALID, "page_size"),
        ("GetKnowledgeBaseStats", pb.GetKnowledgeBaseStatsRequest(knowledge_base="none"), MISSING, ""),
        ("UpsertPairs", pb.UpsertPairsRequest(), INVALID, "pairs"),
        ("UpsertPairs", pb.UpsertPairsRequest(pairs=[_pair("x")]), INVALID, "knowledge_base"),
        ("UpsertPairs", pb.UpsertPairsRequest(pairs=[_pair("x")] * 257), INVALID, "pairs"),
        ("UpsertPairs", pb.UpsertPairsRequest(knowledge_base="none", pairs=[_pair("x")]), MISSING, ""),
        ("DeletePairs", pb.DeletePairsRequest(knowledge_base="small"), INVALID, "pair_ids"),
        ("DeletePairs", pb.DeletePairsRequest(knowledge_base="small", pair_ids=["x"] * 1001), INVALID, "pair_ids"),
        ("DeletePairs", pb.DeletePairsRequest(pair_ids=["x"]), INVALID, "knowledge_base"),
        ("GetPair", pb.GetPairRequest(knowledge_base="small"), INVALID, "pair_id"),
        ("GetPair", pb.GetPairRequest(knowledge_base="small", pair_id="\0"), MISSING, ""),
        ("ListPairs", pb.ListPairsRequest(knowledge_base="small", page_size=1001), INVALID, "page_size"),
        ("CreateSnapshot", pb.CreateSnapshotRequest(knowledge_base="none"), MISSING, ""),
        ("CreateSnapshot", pb.CreateSnapshotRequest(), INVALID, "knowledge_base"),
    ],
)
def test_bad_requests_are_refused_by_name(
    client: Client, method: str, request_message: Any, code: grpc.StatusCode, field: str
) -> None:
    error = refusal(getattr(client.bases, method), request_message)
    assert error.code() == code, error
    assert reason(error) == ("FIELD_INVALID" if code == INVALID else "NOT_FOUND")
    assert [violation.field for violation in violations(error)] == ([field] if field else [])


def test_without_a_folder_no_snapshot_is_made_and_other_addresses_are_left_alone(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside.png"
    allowed.mkdir()
    (allowed / "in.png").write_bytes(picture(1))
    outside.write_bytes(picture(2))
    (allowed / "link.png").symlink_to(outside)
    with hosted(tmp_path / "data", image_prefixes=f"file://{allowed}") as client:
        fill(client, pairs=make_pairs(["cat"]))
        refused = refusal(client.bases.CreateSnapshot, pb.CreateSnapshotRequest(knowledge_base="small"))
        assert (refused.code(), reason(refused)) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "SNAPSHOTS_NOT_CONFIGURED",
        )
        uris = {
            "in": f"file://{allowed}/in.png",
            "out": f"file://{outside}",
            "link": f"file://{allowed}/link.png",
            "up": f"file://{allowed}/../outside.png",
        }
        pairs = [_pair(name, caption=f"{name} tray", image=b"", image_uri=uri) for name, uri in uris.items()]
        assert {r.outcome for r in _upsert(client, *pairs).results} == {CREATED}
        caught_up(client)
        found = {n.pair_id: n for n in client.retrieve("tray", k=10).neighbors}
        assert {name: n.image for name, n in found.items()} == {"in": picture(1), "out": b"", "link": b"", "up": b""}
        assert {name: n.image_uri for name, n in found.items()} == uris
