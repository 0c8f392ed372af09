"""Records are read as strangers' words: what is wrong is named, and nothing else happens."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reimagen.retrieval.v1 import retrieval_pb2

from common.service.errors import InvalidArgument
from common.stages import STAGES
from generator_svc.recorded import FORMAT, MAX_RECORD_CHARACTERS, METHODS, read_record

NEIGHBOR = {
    "rank": 1,
    "score": 3.5,
    "pair_id": "noto--guide-dog",
    "caption": "guide dog, noto style",
    "entity": "guide dog",
    "image_sha256": "0" * 64,
    "facets": {"style": "noto"},
    "author": "a",
    "source": "s",
    "license": "l",
    "is_reference": False,
}
RECORD: dict[str, Any] = {
    "format": FORMAT,
    "prompt": "a guide dog",
    "negative_prompt": "",
    "retrieval": {
        "k": 2,
        "knowledge_base": "demo",
        "index_fingerprint": "f",
        "method": "METHOD_BM25",
        "excluded_pair_ids": [],
        "exclude_exact": False,
        "shortfall_reason": "",
        "degraded_reason": "",
    },
    "neighbors": [NEIGHBOR],
    "start_from_sha256": "",
    "weights": {spec.name: "0" * 64 for spec in STAGES},
    "text_encoder": "t",
    "seed": 7,
    "picture": 0,
    "plans": [spec.plan(seed=7).to_json() for spec in STAGES],
}


def changed(change: Callable[[Any], None]) -> str:
    record = copy.deepcopy(RECORD)
    change(record)
    return json.dumps(record)


def test_a_record_is_read() -> None:
    recorded = read_record(json.dumps(RECORD))
    assert [plans[0] for plans in recorded.plans] == [spec.plan(seed=7) for spec in STAGES]
    assert recorded.neighbors[0].facets == {"style": "noto"} and recorded.references == ()
    assert set(recorded.weights) == {64, 256, 1024}


def test_its_methods_are_the_contracts() -> None:
    assert list(retrieval_pb2.Method.keys()) == list(METHODS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(format="reimagen-record/1"), "format: 'reimagen-record/1'"),
        (lambda r: r.pop("prompt"), "prompt: is missing"),
        (lambda r: r.update(prompt=5), "prompt: '5' is no str"),
        (lambda r: r.update(prompt="\ud800"), "prompt: holds half"),
        (lambda r: r.update(plans=[]), "plans: of"),
        (lambda r: r.update(plans="all"), "plans: 'all' is no list"),
        (lambda r: r.update(plans=[5]), r"plans\[0\]: is no JSON object"),
        (lambda r: r["plans"].pop(1), "follow one another"),
        (lambda r: r["plans"].reverse(), "follow one another"),
        (lambda r: r["plans"][0].update(stage=128), "follow one another"),
        (lambda r: r["plans"][0].update(steps=0), r"plans\[0\]: steps: 0"),
        (lambda r: r["plans"][0].update(steps=10**9), r"plans\[0\]: steps: 1000000000"),
        (lambda r: r["plans"][0].update(extra=1), r"plans\[0\]: .*extra"),
        (lambda r: r["plans"][0].update(schedule="linear"), "stage 64 has the schedule 'cosine'"),
        (lambda r: r["plans"][0]["guidance"].update(text_weight=1e9), r"guidance\.text_weight"),
        (lambda r: r["plans"][0]["guidance"].update(eta=math.nan), "NaN is no number"),
        (lambda r: r["plans"][0]["guidance"].update(eta="0.5"), "guidance.eta: '0.5'"),
        (lambda r: r["plans"][1].update(seed=8), "same pictures"),
        (lambda r: r["plans"][1].update(start_time=0.5), "first stage"),
        (lambda r: r["plans"].insert(1, r["plans"][0] | {"sample": 1, "steps": 9}), "more than seed and sample"),
        (lambda r: r.update(plans=r["plans"] * 9), "holds 27; at most 24"),
        (lambda r: r.update(neighbors=[NEIGHBOR] * 65), "holds 65; at most 64"),
        (lambda r: r["neighbors"][0].update(rank=-1), "rank -1"),
        (lambda r: r["neighbors"][0].update(rank=True), "rank: 'True' is no int"),
        (lambda r: r["neighbors"][0].update(score="high"), "score: 'high'"),
        (lambda r: r["neighbors"][0].update(facets={"style": 5}), "facets.style: '5'"),
        (lambda r: r["neighbors"][0].update(pair_id=""), "pair_id"),
        (lambda r: r["neighbors"].append(NEIGHBOR | {"is_reference": True}), "stands behind"),
        (lambda r: r["retrieval"].update(method="METHOD_MAGIC"), "'METHOD_MAGIC'"),
        (lambda r: r["retrieval"].update(k=65), "retrieval.k: 65"),
        (lambda r: r["retrieval"].update(excluded_pair_ids=[5]), "excluded_pair_ids"),
        (lambda r: r["weights"].pop("unet_256"), "weights.unet_256: is missing"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Any], None], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        read_record(changed(change))
    assert caught.value.violations[0][0] == "record_json"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '"x"', "[" * 100_000, "1" * 10_000, "x" * (MAX_RECORD_CHARACTERS + 1)]
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_record(text)
    assert caught.value.violations[0][0] == "record_json"


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(places(RECORD)[1:]), value=ANYTHING)
def test_anything_anywhere_is_read_or_refused(place: tuple[Any, ...], value: Any) -> None:
    record = copy.deepcopy(RECORD)
    holder = record
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with suppress(InvalidArgument):  # any other exception would be a fault of ours
        read_record(json.dumps(record))
