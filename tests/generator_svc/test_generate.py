"""The whole flow over Unix sockets, with the real retrieval service and a tiny cascade."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as Pictures
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc

from client.generator import (
    Accepted,
    Done,
    Event,
    GenerationFailed,
    GenerationRequest,
    GeneratorClient,
    Image,
    NeighborsFound,
    StageFinished,
    StageOverrides,
    StageStarted,
    StepDone,
)
from common.images import decode_rgb
from generator_svc.picture_files import CHUNK
from tests.generator_svc.asking import PROMPT, QUICK, REQUEST, SIZES, TIMEOUT_S, draw, images, record
from tests.generator_svc.tiny_stack import TINY_UNETS, Host, Service


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def drawn(client: GeneratorClient) -> list[Event]:
    """The events of REQUEST."""
    return draw(client, REQUEST)


def test_the_events_come_in_order(drawn: list[Event]) -> None:
    told = [(type(event), getattr(event, "stage", None), getattr(event, "step", None)) for event in drawn]
    stages = [
        [(StageStarted, size, None), (StepDone, size, 1), (StepDone, size, 2), (StageFinished, size, None)]
        for size in SIZES
    ]
    head, tail = [(Accepted, None, None), (NeighborsFound, None, None)], [(Image, None, None), (Done, None, None)]
    assert told == [*head, *stages[0], *stages[1], *stages[2], *tail]
    accepted, found = drawn[:2]
    assert accepted == Accepted(prompt=PROMPT, seed=7, num_pictures=1, stages=SIZES, seeds=(7,))
    assert isinstance(found, NeighborsFound)
    assert [neighbor.entity for neighbor in found.neighbors] == ["guide dog", "guide dog"]
    assert found.neighbors[0].license == "CC-BY-4.0" and found.neighbors[0].image.startswith(b"<svg")
    assert (found.knowledge_base, found.method, found.shortfall_reason) == ("demo", "bm25", "")
    finished = {event.stage: event.image for event in drawn if isinstance(event, StageFinished)}
    assert decode_rgb(finished[64]).shape == (64, 64, 3)
    assert decode_rgb(finished[256]).shape == (256, 256, 3)
    assert finished[1024] == b"", "the last stage's picture comes as the image"
    assert decode_rgb(images(drawn)[0]).shape == (1024, 1024, 3)


def test_the_record_says_what_drew_it(drawn: list[Event]) -> None:
    whole = record(drawn)
    assert (whole["prompt"], whole["seed"]) == (PROMPT, 7)
    assert [(plan["stage"], plan["steps"]) for plan in whole["plans"]] == [(size, 2) for size in SIZES]
    assert [neighbor["author"] for neighbor in whole["neighbors"]] == ["author of noto", "author of twemoji"]
    assert all(neighbor["license"] == "CC-BY-4.0" and neighbor["score"] > 0 for neighbor in whole["neighbors"])
    assert all(len(whole["weights"][f"unet_{size}"]) == 64 for size in SIZES)
    assert whole["timings_s"]["total"] > whole["timings_s"]["stage_64"] > 0
    assert set(whole["versions"]) == {"python", "torch", "numpy"}
    with Pictures.open(io.BytesIO(images(drawn)[0])) as picture:
        inside = json.loads(picture.info[CHUNK])
    assert inside["picture"] == 0
    assert "timings_s" not in inside and "versions" not in inside
    for name in ("prompt", "seed", "plans", "neighbors", "weights", "retrieval", "text_encoder"):
        assert inside[name] == whole[name]


def test_a_seed_draws_the_same_bytes_again(client: GeneratorClient, drawn: list[Event]) -> None:
    again = draw(client, REQUEST)
    assert images(again) == images(drawn)
    assert [event for event in again if not isinstance(event, Done)] == drawn[:-1]
    other = draw(client, replace(REQUEST, seed=8))
    assert decode_rgb(images(other)[0]).tobytes() != decode_rgb(images(drawn)[0]).tobytes()


def test_without_a_seed_one_is_drawn_and_told(client: GeneratorClient) -> None:
    events = draw(client, replace(QUICK, seed=None))
    accepted = events[0]
    assert isinstance(accepted, Accepted)
    assert images(draw(client, replace(QUICK, seed=accepted.seed))) == images(events)
    assert record(events)["seed"] == accepted.seed


GUIDED = StageOverrides(stage=64, steps=6, text_weight=2.0, neighbor_weight=6.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a red apple, noto style"},
        {"k": 1},
        {"k": 3},
        {"excluded_pair_ids": ("twemoji--guide-dog",)},
        {"exclude_exact": True},
        {"without_neighbors": True, "stages": (replace(GUIDED, neighbor_weight=None),)},
        {"seed": 8},
        {"stages": (replace(GUIDED, steps=3),)},
        {"stages": (replace(GUIDED, sampler="ddpm"),)},
        {"stages": (replace(GUIDED, guidance_strategy="joint", neighbor_weight=None),)},
        {"stages": (replace(GUIDED, text_weight=9.0),)},
        {"stages": (replace(GUIDED, neighbor_weight=9.0),)},
        {"stages": (replace(GUIDED, eta=0.1),)},
        {"stages": (replace(GUIDED, thresholding="none"),)},
    ],
    ids=str,
)
def test_every_knob_of_the_base_changes_the_picture(client: GeneratorClient, changes: dict[str, Any]) -> None:
    base = replace(QUICK, stages=(GUIDED,))
    before, after = draw(client, base), draw(client, replace(base, **changes))
    assert decode_rgb(images(before)[0]).tobytes() != decode_rgb(images(after)[0]).tobytes()


def test_augmentation_changes_the_picture(client: GeneratorClient) -> None:
    stages = (StageOverrides(stage=64, steps=2), StageOverrides(stage=256, steps=2, augmentation=0.2))
    before = draw(client, replace(REQUEST, stop_at=256, stages=REQUEST.stages[:2]))
    after = draw(client, replace(REQUEST, stop_at=256, stages=stages))
    assert images(before) != images(after)
    assert record(after)["plans"][1]["augmentation"] == 0.2


@pytest.mark.parametrize("stop_at", SIZES)
def test_it_stops_at_the_asked_stage(client: GeneratorClient, stop_at: int) -> None:
    events = draw(client, replace(REQUEST, stop_at=stop_at, stages=REQUEST.stages[: SIZES.index(stop_at) + 1]))
    assert decode_rgb(images(events)[0]).shape == (stop_at, stop_at, 3)
    assert [plan["stage"] for plan in record(events)["plans"]] == [size for size in SIZES if size <= stop_at]


def test_several_pictures_are_drawn_apart(client: GeneratorClient) -> None:
    events = draw(client, replace(QUICK, num_pictures=3))
    three = [decode_rgb(png).astype(int) for png in images(events)]
    assert [event.picture for event in events if isinstance(event, Image)] == [0, 1, 2]
    assert len({picture.tobytes() for picture in three}) == 3
    alone = decode_rgb(images(draw(client, QUICK))[0]).astype(int)
    assert np.abs(three[0] - alone).max() <= 1, "the first of three is the one of one"
    assert [plan["sample"] for plan in record(events)["plans"]] == [0, 1, 2]


def test_previews_come_as_asked(client: GeneratorClient) -> None:
    request = replace(QUICK, preview_every=2, stages=(StageOverrides(stage=64, steps=5),))
    steps = [event for event in draw(client, request) if isinstance(event, StepDone)]
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert [bool(step.preview_png) for step in steps] == [False, True, False, True, False]
    assert decode_rgb(steps[1].preview_png).shape == (64, 64, 3)


def test_without_neighbors_retrieval_is_not_asked(client: GeneratorClient) -> None:
    events = draw(client, replace(QUICK, prompt="nothing like it, cubist style", without_neighbors=True))
    found = events[1]
    assert isinstance(found, NeighborsFound) and found.neighbors == () and found.method == "unspecified"
    assert record(events)["retrieval"]["k"] == 0


def test_fewer_neighbors_than_asked_say_why(client: GeneratorClient) -> None:
    found = draw(client, replace(QUICK, k=5))[1]
    assert isinstance(found, NeighborsFound)
    assert len(found.neighbors) == 3 and "asked for 5, found 3" in found.shortfall_reason


@pytest.mark.parametrize(
    ("changes", "code", "field", "named"),
    [
        ({"prompt": ""}, "INVALID_ARGUMENT", "prompt", "empty"),
        ({"prompt": "x" * 10_000}, "INVALID_ARGUMENT", "prompt", "10000"),
        ({"prompt": "dog, vaporwave style"}, "INVALID_ARGUMENT", "prompt", "'vaporwave'"),
        ({"k": 65}, "INVALID_ARGUMENT", "k", "65"),
        ({"num_pictures": 9}, "INVALID_ARGUMENT", "num_pictures", "9"),
        ({"seed": 2**63}, "INVALID_ARGUMENT", "seed", str(2**63)),
        ({"stop_at": 65}, "INVALID_ARGUMENT", "stop_at", "65"),
        ({"stages": (StageOverrides(stage=65),)}, "INVALID_ARGUMENT", "stages[0].stage", "65"),
        ({"stages": (StageOverrides(stage=64, steps=0),)}, "INVALID_ARGUMENT", "stages[0].steps", "0"),
        ({"without_neighbors": True, "k": 1}, "INVALID_ARGUMENT", "k", "without_neighbors"),
        ({"knowledge_base": "big"}, "NOT_FOUND", None, "'big'"),
        ({"method": "clip"}, "FAILED_PRECONDITION", None, "CLIP"),
    ],
)
def test_bad_requests_are_refused_by_name(
    client: GeneratorClient, changes: dict[str, Any], code: str, field: str | None, named: str
) -> None:
    with pytest.raises(GenerationFailed) as caught:
        draw(client, replace(QUICK, **changes))
    assert caught.value.code == code
    assert named in str(caught.value)
    assert [violation.field for violation in caught.value.violations] == ([field] if field else [])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(prompt="dog", method=17), "method"),  # pyright: ignore[reportArgumentType]
        (pb.GenerateRequest(prompt="dog", stages=[pb.StageOverrides(stage=64, sampler=9)]), "stages[0].sampler"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_numbers_outside_an_enum_are_refused(generator: Service, message: pb.GenerateRequest, field: str) -> None:
    with grpc.insecure_channel(generator.settings.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(pb_grpc.GeneratorServiceStub(channel).Generate(message, timeout=TIMEOUT_S))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and field in error.details()


@pytest.mark.parametrize("how", ["close", "deadline"])
def test_a_caller_that_goes_away_stops_the_runtime(client: GeneratorClient, generator: Service, how: str) -> None:
    def num_steps() -> float:
        return generator.figure("reimagen_generator_step_batch_size_count", stage=64)

    def is_still() -> bool:
        before = num_steps()
        time.sleep(0.5)
        return num_steps() == before

    wait_until(is_still)  # of the test before
    before = num_steps()
    request = replace(QUICK, num_pictures=4, stages=(StageOverrides(stage=64, steps=1000),))
    events = client.generate(request, timeout_s=TIMEOUT_S if how == "close" else 1.0)
    if how == "close":
        assert any(isinstance(event, StepDone) and event.step == 3 for event in events)
        events.close()
    else:
        with pytest.raises(GenerationFailed) as caught:
            list(events)
        assert caught.value.code == "DEADLINE_EXCEEDED"

    wait_until(lambda: generator.figure("reimagen_generator_taken_bytes", stage=64) == 0 and is_still())
    assert num_steps() - before < 1000, "the trajectory went on to its end"
    assert images(draw(client, QUICK))


def test_many_at_once_draw_what_one_alone_draws(client: GeneratorClient, generator: Service) -> None:
    requests = [
        replace(QUICK, seed=seed, k=1 + seed % 3, stages=(StageOverrides(stage=64, steps=4 + seed % 4),))
        for seed in range(8)
    ]
    alone = [decode_rgb(images(draw(client, request))[0]).astype(int) for request in requests]
    together = threading.Barrier(len(requests))

    def ask(request: GenerationRequest) -> np.ndarray:
        together.wait(TIMEOUT_S)
        return decode_rgb(images(draw(client, request))[0]).astype(int)

    with ThreadPoolExecutor(len(requests)) as pool:
        crowded = list(pool.map(ask, requests))
    for lonely, shared in zip(alone, crowded, strict=True):
        assert np.abs(lonely - shared).max() <= 1, "more than a rounding apart"
    steps = generator.figure("reimagen_generator_step_batch_size_count", stage=64)
    assert generator.figure("reimagen_generator_step_batch_size_sum", stage=64) > steps, "nobody shared a batch"


def test_too_much_at_once_is_refused_before_any_work(host: Host, make_generator: Callable[..., Service]) -> None:
    service = make_generator(max_live_bytes=1 << 20)
    with host.running(service) as address, GeneratorClient(address) as client:
        assert images(draw(client, QUICK))
        with pytest.raises(GenerationFailed, match="stage 256") as caught:
            draw(client, REQUEST)
        assert caught.value.code == "RESOURCE_EXHAUSTED" and caught.value.retry_after_s is None
        assert service.figure("reimagen_generator_taken_bytes", stage=64) == 0
        endless = replace(QUICK, num_pictures=8, stages=(StageOverrides(stage=64, steps=1000),))
        with closing(client.generate(endless, timeout_s=TIMEOUT_S)) as events:
            next(events)
            with pytest.raises(GenerationFailed, match="stage 64") as caught:
                draw(client, replace(QUICK, num_pictures=8))
        assert caught.value.code == "RESOURCE_EXHAUSTED" and caught.value.retry_after_s


def test_retrieval_that_is_away_is_unavailable(
    host: Host, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock")
    with host.running(service) as address, GeneratorClient(address) as client:
        with pytest.raises(GenerationFailed, match=r"retrieval at unix:.*nobody\.sock") as caught:
            draw(client, QUICK)
        assert caught.value.code == "UNAVAILABLE" and caught.value.retry_after_s
        assert images(draw(client, replace(QUICK, without_neighbors=True))), "text alone needs no retrieval"


def test_the_tiny_cascade_has_every_stage() -> None:
    assert tuple(TINY_UNETS) == SIZES
