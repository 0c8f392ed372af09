"""Retrieve and BatchRetrieve over real sockets."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from client.errors import reason, violations
from common.service.errors import Unavailable
from retrieval_svc import vectors
from tests.retrieval_svc.serving import TIMEOUT_S, Client, caught_up, fill, hosted, picture, refusal, vector

PROMPT = "guide dog, noto style, on a white background"
NUL = "guide\0dog"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service with one knowledge base."""
    with hosted(tmp_path_factory.mktemp("data")) as running:
        fill(running)
        caught_up(running)
        yield running


def test_bm25(client: Client) -> None:
    response = client.retrieve(PROMPT)
    first, second = response.neighbors
    assert (first.pair_id, first.rank, second.pair_id, second.rank) == ("noto--guide-dog", 1, "twemoji--guide-dog", 2)
    assert (first.image, first.image_format, len(first.image_sha256)) == (picture(0), "png", 64)
    assert (dict(first.facets), first.author, first.license) == ({"style": "noto"}, "author of noto", "CC-BY-4.0")
    assert (first.safe, first.version > 0, list(first.embedding)) == (True, True, [])
    assert [(leg.leg, leg.rank) for leg in first.legs] == [(pb.METHOD_BM25, 1)]
    assert (response.knowledge_base, response.method, response.shortfall_reason) == ("small", pb.METHOD_BM25, "")
    assert (len(response.index_fingerprint), list(response.failed_legs)) == (64, [])
    assert response.index_generation >= second.version
    understood = response.query
    assert (understood.entity, dict(understood.facets)) == ("guide dog", {"style": "noto"})
    assert list(understood.scene_phrases) == ["on a white background"]


def test_clip_by_embedding(client: Client) -> None:
    response = client.retrieve(
        k=3, method=pb.METHOD_CLIP, query_embedding=vector(4), include_embeddings=True, omit_images=True
    )
    first = response.neighbors[0]
    assert (first.pair_id, first.image, len(response.neighbors)) == ("noto--red-apple", b"", 3)
    assert first.score == pytest.approx(1.0, abs=1e-3)
    norm = math.hypot(*vector(4))
    assert list(first.embedding) == pytest.approx([part / norm for part in vector(4)], abs=1e-2)
    assert not response.HasField("query")


def test_hybrid_fuses_both_legs(client: Client) -> None:
    weights = pb.QueryWeights(text=0, embedding=1)
    response = client.retrieve(
        "guide dog, noto style", k=4, method=pb.METHOD_HYBRID, query_embedding=vector(0), query_weights=weights
    )
    first = response.neighbors[0]
    assert first.pair_id == "noto--guide-dog"
    assert {leg.leg: leg.rank for leg in first.legs} == {pb.METHOD_BM25: 1, pb.METHOD_CLIP: 1}
    assert first.score == pytest.approx(2 / 61)
    assert response.method == pb.METHOD_HYBRID


def test_filters_and_exclusions(client: Client) -> None:
    only = pb.Filter(facets={"style": pb.Values(values=["twemoji"])}, licenses=["Apache-2.0"], safe=False)
    assert {n.facets["style"] for n in client.retrieve("dog", k=10, filter=only).neighbors} == {"twemoji"}
    none = client.retrieve("dog", k=2, filter=pb.Filter(sources=["elsewhere"]))
    assert (len(none.neighbors), "asked for 2, found 0" in none.shortfall_reason) == (0, True)
    left = client.retrieve("dog", k=10, excluded_pair_ids=["noto--hot-dog"], excluded_entities=["guide dog"]).neighbors
    assert [n.pair_id for n in left] == ["twemoji--hot-dog"]
    honest = client.retrieve("guide dog, noto style", k=1, exclude_exact=True).neighbors
    assert [n.pair_id for n in honest] == ["twemoji--guide-dog"]


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"prompt": ""}, INVALID, "prompt"),
        ({"prompt": "x" * 10_001}, INVALID, "prompt"),
        ({"prompt": "x" * 3_000_000}, INVALID, "prompt"),
        ({"prompt": "dog, vaporwave style"}, INVALID, "prompt"),
        ({"prompt": "noto style"}, INVALID, "prompt"),
        ({"prompt": "dog", "k": 65}, INVALID, "k"),
        ({"prompt": "dog", "k": 2**32 - 1}, INVALID, "k"),
        ({"prompt": "dog", "method": 17}, INVALID, "method"),
        ({"prompt": "dog", "method": -(2**31)}, INVALID, "method"),
        ({"prompt": "dog", "knowledge_base": "big"}, MISSING, ""),
        ({"prompt": "dog", "knowledge_base": "x" * 100_000}, MISSING, ""),
        ({"prompt": "dog", "knowledge_base": "../small"}, MISSING, ""),
        ({"prompt": "dog", "knowledge_base": NUL}, MISSING, ""),
        ({"prompt": "dog", "diversity": math.nan}, INVALID, "diversity"),
        ({"prompt": "dog", "diversity": 1.5}, INVALID, "diversity"),
        ({"prompt": "dog", "near_duplicate_similarity": math.inf}, INVALID, "near_duplicate_similarity"),
        ({"prompt": "dog", "excluded_pair_ids": ["x"] + [str(n) for n in range(1001)]}, INVALID, "excluded_pair_ids"),
        ({"prompt": "dog", "excluded_entities": [f"e {n}" for n in range(1001)]}, INVALID, "excluded_entities"),
        ({"prompt": "dog", "query_embedding": [1.0] * 8}, INVALID, "query_embedding"),
        ({"method": pb.METHOD_CLIP}, INVALID, "prompt"),
        ({"method": pb.METHOD_CLIP, "query_embedding": [1.0] * 9}, INVALID, "query_embedding"),
        ({"method": pb.METHOD_CLIP, "query_embedding": [1.0] * 1_000_000}, INVALID, "query_embedding"),
        ({"method": pb.METHOD_CLIP, "query_embedding": [math.nan] * 8}, INVALID, "query_embedding"),
        ({"method": pb.METHOD_CLIP, "query_embedding": [math.inf] * 8}, INVALID, "query_embedding"),
        ({"method": pb.METHOD_CLIP, "query_embedding": [0.0] * 8}, INVALID, "query_embedding"),
        (
            {"method": pb.METHOD_CLIP, "query_embedding": [1.0] * 8, "query_weights": pb.QueryWeights(embedding=-1)},
            INVALID,
            "query_weights.embedding",
        ),
        ({"prompt": "dog", "filter": pb.Filter(facets={"style": pb.Values()})}, INVALID, "filter.facets"),
        ({"prompt": "dog", "filter": pb.Filter(licenses=["x"] * 1001)}, INVALID, "filter"),
    ],
)
def test_bad_requests_are_refused_by_name(
    client: Client, fields: dict[str, Any], code: grpc.StatusCode, field: str
) -> None:
    error = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(**fields))
    assert error.code() == code, error
    assert reason(error) == ("FIELD_INVALID" if code == INVALID else "NOT_FOUND")
    assert [violation.field for violation in violations(error)] == ([field] if field else [])


def test_no_clip_model_no_text_for_clip(client: Client) -> None:
    for fields in ({"prompt": "dog"}, {"query_image": picture(1)}):
        error = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(method=pb.METHOD_CLIP, **fields))  # type: ignore[arg-type]
        assert (error.code(), reason(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "PRECONDITION_FAILED")
        assert "no model to embed with" in error.details()


def test_control_characters_find_nothing_and_break_nothing(client: Client) -> None:
    for prompt in (
        "dog\0",
        "dog\x1f",
        "dog\u202e",
        "🐕" * 500,
        "dog' OR 1=1 --",
        'dog" AND (',
        "*:*",
        "dog~9 +cat^1e9",
    ):
        try:
            client.retrieve(prompt, excluded_pair_ids=["\0"], excluded_entities=["\0"])
        except grpc.RpcError as error:
            refused: Any = error
            if refused.code() != INVALID:
                raise


def _leg_times(client: Client) -> dict[tuple[str, str], float]:
    """How often the time of a leg was taken, by leg and outcome."""
    name = "reimagen_retrieval_duration_seconds_count"
    labels = [(leg, outcome) for leg in ("bm25", "vector", "fused") for outcome in ("ok", "error", "degraded")]
    return {(leg, outcome): client.figure(name, leg=leg, outcome=outcome) for leg, outcome in labels}


def test_each_leg_of_a_lookup_is_timed(client: Client) -> None:
    before = _leg_times(client)
    client.retrieve("cat")
    client.retrieve(
        "cat", method=pb.METHOD_HYBRID, query_embedding=vector(0), query_weights=pb.QueryWeights(embedding=1)
    )
    after = _leg_times(client)
    timed = {label: num - before[label] for label, num in after.items() if num != before[label]}
    assert timed == {("bm25", "ok"): 2, ("vector", "ok"): 1, ("fused", "ok"): 1}
    total = "reimagen_retrieval_duration_seconds_sum"
    assert 0 < client.figure(total, leg="vector", outcome="ok") < client.figure(total, leg="fused", outcome="ok")


def test_one_leg_down_and_the_other_answers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {
        "method": pb.METHOD_HYBRID,
        "query_embedding": vector(0),
        "query_weights": pb.QueryWeights(embedding=1),
    }
    labels = {"leg": "vector", "reason": "unavailable"}
    before = client.figure("reimagen_retrieval_leg_failures_total", **labels)
    times = _leg_times(client)

    def down(*arguments: Any, **options: Any) -> None:
        raise Unavailable("the vector store is away")

    for search_of_the_store in ("nearest", "nearest_briefs"):
        monkeypatch.setattr(vectors.EdgePairStore, search_of_the_store, down)
    response = client.retrieve("guide dog, noto style", **fields)
    assert [n.pair_id for n in response.neighbors] == ["noto--guide-dog", "twemoji--guide-dog"]
    assert [(f.leg, f.reason) for f in response.failed_legs] == [(pb.METHOD_CLIP, "the vector store is away")]
    assert client.figure("reimagen_retrieval_leg_failures_total", **labels) == before + 1
    assert client.figure("reimagen_retrieval_requests_total", leg="fused", outcome="degraded") == 1
    timed = {label: num - times[label] for label, num in _leg_times(client).items() if num != times[label]}
    assert timed == {("bm25", "ok"): 1, ("vector", "error"): 1, ("fused", "degraded"): 1}
    alone = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(method=pb.METHOD_CLIP, query_embedding=vector(0)))
    assert (alone.code(), reason(alone)) == (grpc.StatusCode.UNAVAILABLE, "TEMPORARILY_UNAVAILABLE")


def _batch(prompts: list[str]) -> list[pb.BatchRetrieveRequest]:
    return [
        pb.BatchRetrieveRequest(request_id=f"{number}", request=pb.RetrieveRequest(prompt=prompt))
        for number, prompt in enumerate(prompts)
    ]


def test_a_batch_keeps_its_order_and_its_errors(client: Client) -> None:
    prompts = ["guide dog", "", "cat", "noto style", "red apple"] * 40
    answers = list(client.retrieval.BatchRetrieve(iter(_batch(prompts)), timeout=TIMEOUT_S))
    assert [answer.request_id for answer in answers] == [str(number) for number in range(200)]
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt in ("", "noto style"):
            assert (answer.error.code, answer.error.field) == (INVALID.value[0], "prompt")
        else:
            assert answer.response.neighbors[0].entity == prompt
    assert answers[0].response == client.retrieve("guide dog")


def test_a_batch_is_answered_as_it_comes_and_may_be_left(client: Client) -> None:
    more = threading.Event()

    def slowly() -> Iterator[pb.BatchRetrieveRequest]:
        yield _batch(["cat"])[0]
        more.wait(TIMEOUT_S)

    stream = client.retrieval.BatchRetrieve(slowly(), timeout=TIMEOUT_S)
    assert next(stream).response.neighbors[0].entity == "cat", "before the next request is sent"
    stream.cancel()
    more.set()
    assert client.retrieve("cat").neighbors


def test_a_batch_that_is_not_read_is_not_read_from(client: Client) -> None:
    taken = 0

    def endless() -> Iterator[pb.BatchRetrieveRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield pb.BatchRetrieveRequest(request=pb.RetrieveRequest(prompt="cat " + "x" * 1000, omit_images=True))

    stream = client.retrieval.BatchRetrieve(endless(), timeout=TIMEOUT_S)
    next(stream)
    until, before = time.monotonic() + TIMEOUT_S, 0
    while taken != before:  # what the connection buffers differs by machine; an end to it there is
        assert time.monotonic() < until, f"{taken} requests were taken, and more are"
        before = taken
        time.sleep(0.5)
    stream.cancel()


def test_metrics(client: Client) -> None:
    names = {family.name for family in client.registry.collect()}
    assert names >= {
        "reimagen_retrieval_requests",
        "reimagen_retrieval_duration_seconds",
        "reimagen_retrieval_leg_failures",
        "reimagen_retrieval_results",
        "reimagen_retrieval_index_documents",
        "reimagen_retrieval_index_generation_timestamp_seconds",
    }
    assert client.figure("reimagen_retrieval_index_documents", index="small") == 10
    moment = client.figure("reimagen_retrieval_index_generation_timestamp_seconds", index="small")
    assert abs(moment - time.time()) < 600
    assert client.figure("reimagen_retrieval_requests_total", leg="bm25", outcome="ok") > 0
    assert client.figure("reimagen_retrieval_requests_total", leg="bm25", outcome="invalid_argument") > 0
    series = sum(len(family.samples) for family in client.registry.collect())
    assert series < 1000, "labels are bounded"


def test_without_a_name_the_only_one_answers(tmp_path: Path) -> None:
    with hosted(tmp_path) as client:
        nobody = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(prompt="dog"))
        assert [v.field for v in violations(nobody)] == ["knowledge_base"]
        fill(client, "first")
        caught_up(client, "first")
        assert client.retrieve("cat").knowledge_base == "first"
        fill(client, "second")
        assert client.retrieve("cat", knowledge_base="second").knowledge_base == "second"
        either = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(prompt="dog"))
        assert [v.field for v in violations(either)] == ["knowledge_base"]
