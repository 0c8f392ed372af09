"""Whatever a request holds, it is drawn or refused by name: never is a fault of ours what the caller is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc

from client.errors import violations
from client.generator import GeneratorClient
from tests.generator_svc.asking import QUICK, TIMEOUT_S, draw, images
from tests.generator_svc.test_callers_pictures import HARMFUL, PNG
from tests.generator_svc.tiny_stack import Service

REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
# Valid ones weigh as much as all others together: a request with one fault among many fields reaches the deepest.
TEXTS = st.sampled_from(("a guide dog", "a red apple, noto style", "", " ", "\0", "\ufffe", "x" * 3000, "犬" * 300))
NUMBERS = st.sampled_from((0, 1, 2, 2, 3, 64, 65, 256, 1024, 2**31, 2**32 - 1))
REALS = st.sampled_from((0.5, 1.0, 0.0, 1.5, -1.0, 1e300, math.nan, math.inf, -math.inf, 5e-324))
FILES = st.sampled_from((PNG, PNG, *(image for image, _ in HARMFUL.values() if len(image) < 200_000)))
SEEDS = st.sampled_from((0, 7, 2**63 - 1, 2**63, 2**64 - 1))


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any few of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


OVERRIDES = some(
    sampler=st.integers(0, 4),
    guidance_strategy=st.integers(0, 4),
    text_weight=REALS,
    neighbor_weight=REALS,
    eta=REALS,
    thresholding=st.integers(0, 4),
    augmentation=REALS,
).map(lambda given: pb.StageOverrides(stage=64, steps=2, **given))
REFERENCES = some(caption=TEXTS, author=TEXTS, license=TEXTS)
REQUESTS = some(
    prompt=TEXTS,
    k=NUMBERS,
    knowledge_base=st.sampled_from(("", "demo", "no such", "\0")),
    method=st.integers(0, 4),
    excluded_pair_ids=st.lists(TEXTS, max_size=2),
    exclude_exact=st.booleans(),
    without_neighbors=st.booleans(),
    num_pictures=NUMBERS,
    seed=SEEDS,
    stages=st.lists(OVERRIDES, max_size=2),
    preview_every=NUMBERS,
    negative_prompt=TEXTS,
    references=st.lists(
        st.builds(lambda image, rest: pb.Reference(image=image, **rest), FILES, REFERENCES), max_size=2
    ),
    seeds=st.lists(SEEDS, max_size=3),
    start_from=st.builds(
        lambda image, rest: pb.StartFrom(image=image, **rest), FILES, some(stage=NUMBERS, strength=REALS)
    ),
    image_format=st.integers(0, 3),
    every_stage=st.booleans(),
    priority=st.integers(0, 4),
    record_json=st.sampled_from(("", "{}", "x")),
)


@pytest.fixture(scope="module")
def stub(client: GeneratorClient, generator: Service) -> Iterator[pb_grpc.GeneratorServiceStub]:
    """Calls of the running generator, without a client that would check first."""
    with grpc.insecure_channel(generator.settings.address) as channel:
        yield pb_grpc.GeneratorServiceStub(channel)


def outcome(stub: pb_grpc.GeneratorServiceStub, request: pb.GenerateRequest) -> tuple[str, Any]:
    """The status's name with the error, or "OK" with the last event."""
    try:
        return "OK", list(stub.Generate(request, timeout=TIMEOUT_S))[-1].WhichOneof("event")
    except grpc.RpcError as error:
        return error.code().name, error  # pyright: ignore[reportAttributeAccessIssue]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=REQUESTS)
def test_any_request_is_drawn_or_refused(stub: pb_grpc.GeneratorServiceStub, fields: dict[str, Any]) -> None:
    code, said = outcome(stub, pb.GenerateRequest(**{"prompt": "a guide dog", "stop_at": 64} | fields))
    event(code)
    assert code in REFUSALS or (code, said) == ("OK", "done"), f"{code}: {said}"
    assert code != "INVALID_ARGUMENT" or violations(said), f"no field is named: {said}"


def test_the_service_draws_on_afterwards(client: GeneratorClient) -> None:
    assert images(draw(client, QUICK))
