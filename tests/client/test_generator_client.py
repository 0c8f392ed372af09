"""The typed client: names to numbers, messages to events, failures to exceptions."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2

from client.generator import (
    Accepted,
    Done,
    GenerationFailed,
    GenerationRequest,
    GeneratorClient,
    Image,
    NeighborsFound,
    Reference,
    StageFinished,
    StageOverrides,
    StageStarted,
    StartFrom,
    StepDone,
)

TIMEOUT_S = 20.0
SEED = 2**63 - 1


class Canned(pb_grpc.GeneratorServiceServicer):
    """Answers one of each event, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        if request.prompt == "unknown event":
            yield pb.GenerateResponse()
        if request.prompt == "slow":
            while context.is_active():
                yield pb.GenerateResponse(step=pb.StepDone(stage=64, step=1, steps=2))
        neighbor = retrieval_pb2.Neighbor(pair_id="a", facets={"style": "noto"}, score=0.5, rank=1, image=b"<svg/>")
        found = pb.NeighborsFound(neighbors=[neighbor], knowledge_base="demo", method=retrieval_pb2.METHOD_BM25)
        yield pb.GenerateResponse(accepted=pb.Accepted(prompt="p", seed=SEED, num_pictures=1, stages=[64, 256]))
        yield pb.GenerateResponse(neighbors=found)
        yield pb.GenerateResponse(stage_started=pb.StageStarted(stage=64, steps=2))
        yield pb.GenerateResponse(step=pb.StepDone(stage=64, picture=1, step=1, steps=2, preview_png=b"preview"))
        yield pb.GenerateResponse(stage_finished=pb.StageFinished(stage=64, picture=1, image=b"png"))
        yield pb.GenerateResponse(image=pb.Image(picture=1, image=b"x" * (5 << 20)))
        yield pb.GenerateResponse(done=pb.Done(record_json='{"seed": 9223372036854775807}'))


@pytest.fixture
def service() -> Canned:
    """A service that draws nothing."""
    return Canned()


@pytest.fixture
def client(service: Canned, tmp_path: Path) -> Iterator[GeneratorClient]:
    """A client of it."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        pb_grpc.add_GeneratorServiceServicer_to_server(service, server)
        address = f"unix:{tmp_path}/g.sock"
        server.add_insecure_port(address)
        server.start()
        with GeneratorClient(address) as connected:
            yield connected
        server.stop(None).wait()


def test_every_event_is_typed(client: GeneratorClient) -> None:
    accepted, found, started, step, finished, image, done = client.generate(
        GenerationRequest(prompt="p"), timeout_s=TIMEOUT_S
    )
    assert accepted == Accepted(prompt="p", seed=SEED, num_pictures=1, stages=(64, 256))
    assert isinstance(found, NeighborsFound) and (found.knowledge_base, found.method) == ("demo", "bm25")
    assert (found.neighbors[0].facets, found.neighbors[0].image) == ({"style": "noto"}, b"<svg/>")
    assert started == StageStarted(stage=64, steps=2)
    assert step == StepDone(stage=64, picture=1, step=1, steps=2, preview_png=b"preview")
    assert finished == StageFinished(stage=64, picture=1, image=b"png")
    assert isinstance(image, Image) and len(image.image) == 5 << 20, "larger than gRPC's default limit"
    assert done == Done(record={"seed": SEED})


def test_a_request_says_everything(client: GeneratorClient, service: Canned) -> None:
    overrides = StageOverrides(
        stage=64,
        steps=2,
        sampler="dpmpp_2m",
        guidance_strategy="weighted",
        text_weight=0.0,
        neighbor_weight=3.0,
        eta=0.0,
        thresholding="none",
        augmentation=0.0,
    )
    request = GenerationRequest(
        prompt="p",
        k=3,
        knowledge_base="b",
        method="hybrid",
        excluded_pair_ids=("x",),
        exclude_exact=True,
        without_neighbors=True,
        num_pictures=4,
        seed=0,
        stop_at=256,
        stages=(overrides, StageOverrides(stage=256)),
        preview_every=5,
        negative_prompt="n",
        references=(Reference(image=b"i", caption="c", author="a", source="s", license="l"),),
        seeds=(1, 2),
        start_from=StartFrom(image=b"i", stage=64, strength=0.0),
        image_format="webp",
        every_stage=True,
        priority="low",
        request_id="4b9e0a0e-9d1a-4d5b-8a0b-0c5a9d5d3f11",
        record_json="{}",
    )
    list(client.generate(request, timeout_s=TIMEOUT_S))
    list(client.generate(GenerationRequest(prompt="p"), timeout_s=TIMEOUT_S))
    said, plain = service.requests
    unset = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} - {f.name for f, _ in said.ListFields()}
    assert unset == set(), "a field of the contract that the client cannot say"
    assert said.HasField("seed") and said.seed == 0 and not plain.HasField("seed")
    for part in (said.stages[0], said.references[0], said.start_from):
        assert {field.name for field in part.DESCRIPTOR.fields} == {f.name for f, _ in part.ListFields()}
    assert (said.stages[0].sampler, said.stages[0].thresholding) == (pb.SAMPLER_DPMPP_2M, pb.THRESHOLDING_NONE)
    assert [field.name for field, _ in said.stages[1].ListFields()] == ["stage"]
    assert (said.image_format, said.priority) == (pb.IMAGE_FORMAT_WEBP, pb.PRIORITY_LOW)
    assert {field.name for field, _ in plain.ListFields()} == {"prompt", "request_id"}
    assert uuid.UUID(plain.request_id).version == 4, "an attempt that is made again has the same one"


@pytest.mark.parametrize(
    ("request_fields", "named"),
    [
        ({"method": "magic"}, "method: 'magic' is not one of bm25, clip, hybrid"),
        (
            {"stages": (StageOverrides(stage=64, sampler="euler"),)},
            r"stages\[0\].sampler: 'euler' is not one of ddpm, ddim, dpmpp_2m",
        ),
        ({"seed": -1}, "seed: Value out of range: -1"),
    ],
)
def test_what_the_contract_cannot_say_is_told(
    client: GeneratorClient, request_fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        list(client.generate(GenerationRequest(prompt="p", **request_fields), timeout_s=TIMEOUT_S))


def test_failures_are_named(client: GeneratorClient, tmp_path: Path) -> None:
    with pytest.raises(GenerationFailed) as caught:
        list(client.generate(GenerationRequest(prompt="slow"), timeout_s=0.3))
    assert caught.value.code == "DEADLINE_EXCEEDED"
    with pytest.raises(GenerationFailed, match="newer than this client"):
        list(client.generate(GenerationRequest(prompt="unknown event"), timeout_s=TIMEOUT_S))
    with GeneratorClient(f"unix:{tmp_path}/nobody.sock") as lonely, pytest.raises(GenerationFailed) as caught:
        list(lonely.generate(GenerationRequest(prompt="p"), timeout_s=TIMEOUT_S))
    assert caught.value.code == "UNAVAILABLE" and caught.value.violations == ()
