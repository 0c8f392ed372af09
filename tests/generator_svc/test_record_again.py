"""A picture's record, given back, draws the picture again; one that cannot be drawn again says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from client.generator import (
    GenerationFailed,
    GenerationRequest,
    GeneratorClient,
    Image,
    NeighborsFound,
    Reference,
    StageOverrides,
    StartFrom,
)
from client.knowledge_base import KnowledgeBases
from client.picture_record import read_record
from deploy.local.knowledge_base import LIBRARY, NAME
from tests.generator_svc.asking import QUICK, REQUEST, TIMEOUT_S, draw, found, images, pixels, record
from tests.generator_svc.tiny_stack import Host, Service, retrieval_service, write_weights

RED = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="9" height="16" fill="red"/></svg>'
BLUE = RED.replace(b"red", b"blue")
REFERENCE = Reference(image=RED, caption="my dog", author="me", source="here", license="CC0-1.0")
TO_256 = replace(REQUEST, stop_at=256, stages=REQUEST.stages[:2])
ODD = StageOverrides(
    stage=64,
    steps=5,
    sampler="ddpm",
    guidance_strategy="interleaved",
    text_weight=3.0,
    neighbor_weight=2.5,
    eta=0.4,
    thresholding="static",
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A request, and what must be given beside its record."""

    name: str
    request: GenerationRequest
    beside: dict[str, Any]


def start(stage: int | None = None, strength: float | None = None) -> dict[str, Any]:
    return {"start_from": StartFrom(image=RED, stage=stage, strength=strength)}


DRAWINGS = [
    Drawing(name="from noise", request=TO_256, beside={}),
    Drawing(
        name="every knob",
        request=replace(
            QUICK,
            k=3,
            excluded_pair_ids=("twemoji--guide-dog",),
            exclude_exact=True,
            negative_prompt="a steam locomotive",
            stages=(ODD,),
        ),
        beside={},
    ),
    Drawing(name="without neighbors", request=replace(QUICK, without_neighbors=True), beside={}),
    Drawing(
        name="references", request=replace(QUICK, references=(REFERENCE,), k=1), beside={"references": (REFERENCE,)}
    ),
    Drawing(
        name="references by their pictures alone",
        request=replace(QUICK, references=(REFERENCE,)),
        beside={"references": (Reference(image=RED, caption=""),)},
    ),
    Drawing(name="a picture", request=replace(QUICK, **start(strength=0.4)), beside=start()),
    Drawing(
        name="after a stage",
        request=replace(TO_256, stages=(StageOverrides(stage=256, augmentation=0.1),), **start(256)),
        beside=start(256),
    ),
    Drawing(
        name="a picture, after a stage",
        request=replace(TO_256, stages=(), **start(256, 0.5)),
        beside=start(256, 0.5),
    ),
]


def again(record_json: str, **beside: Any) -> GenerationRequest:
    return GenerationRequest(record_json=record_json, **beside)


def edited(record_json: str, **changes: Any) -> str:
    return json.dumps(json.loads(record_json) | changes)


@pytest.fixture(scope="module")
def drawn(client: GeneratorClient) -> str:
    """The record inside a PNG."""
    (image,) = images(draw(client, QUICK))
    return read_record(image)


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.name)
def test_the_record_inside_a_picture_draws_it_again(
    client: GeneratorClient, drawing: Drawing, image_format: str
) -> None:
    first = draw(client, replace(drawing.request, image_format=image_format))
    (image,) = images(first)
    second = draw(client, again(read_record(image), image_format=image_format, **drawing.beside))
    assert images(second) == [image], "to the byte, the record included"
    before, after = found(first), found(second)
    assert replace(before, shortfall_reason="") == replace(after, shortfall_reason="")


def test_a_picture_of_several_is_drawn_alone(client: GeneratorClient) -> None:
    events = draw(client, replace(QUICK, num_pictures=3))
    last = [event for event in events if isinstance(event, Image)][2]
    alone = draw(client, again(last.record_json))
    (image,) = [event for event in alone if isinstance(event, Image)]
    assert (image.picture, image.seed, image.record_json) == (0, 7, last.record_json)
    assert abs(pixels(alone) - pixels(events, 2)).max() <= 1


def test_the_record_of_an_order_draws_all_of_it(client: GeneratorClient) -> None:
    events = draw(client, replace(QUICK, seed=None, seeds=(3, 4)))
    assert images(draw(client, again(json.dumps(record(events))))) == images(events)


def test_the_record_knows_how_it_is_encoded_as_little_as_who_waits(client: GeneratorClient, drawn: str) -> None:
    events = draw(client, again(drawn, image_format="webp", preview_every=1, priority="low"))
    (image,) = images(events)
    assert image[8:12] == b"WEBP" and read_record(image) == drawn


@pytest.mark.parametrize(
    ("beside", "field", "named"),
    [
        ({"prompt": "a cat"}, "prompt", "record_json"),
        ({"k": 1}, "k", "record_json"),
        ({"seed": 7}, "seed", "record_json"),
        ({"seeds": (7,)}, "seeds", "record_json"),
        ({"num_pictures": 1}, "num_pictures", "record_json"),
        ({"stop_at": 64}, "stop_at", "record_json"),
        ({"stages": (StageOverrides(stage=64),)}, "stages", "record_json"),
        ({"negative_prompt": "a cat"}, "negative_prompt", "record_json"),
        ({"without_neighbors": True}, "without_neighbors", "record_json"),
        ({"references": (REFERENCE,)}, "references", "drawn with 0"),
        (start(), "start_from", "noise"),
        ({"preview_every": 1001}, "preview_every", "1001"),
    ],
)
def test_what_the_record_says_is_not_said_again(
    client: GeneratorClient, drawn: str, beside: dict[str, Any], field: str, named: str
) -> None:
    with pytest.raises(GenerationFailed, match=named) as caught:
        draw(client, again(drawn, **beside))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [violation.field for violation in caught.value.violations] == [field]


def test_the_pictures_that_a_record_does_not_hold_must_be_the_same(client: GeneratorClient) -> None:
    (shown,) = images(draw(client, replace(QUICK, references=(REFERENCE,), **start(strength=0.5))))
    text, begun = read_record(shown), start()
    for beside, field in (
        ({"references": (REFERENCE,)}, "start_from"),
        (begun, "references"),
        ({"references": (replace(REFERENCE, image=BLUE),), **begun}, "references[0].image"),
        ({"references": (replace(REFERENCE, caption="your dog"),), **begun}, "references[0].caption"),
        ({"references": (replace(REFERENCE, license="MIT"),), **begun}, "references[0].license"),
        ({"references": (REFERENCE,), "start_from": StartFrom(image=BLUE)}, "start_from.image"),
        ({"references": (REFERENCE,), **start(256)}, "start_from.stage"),
        ({"references": (REFERENCE,), **start(None, 0.6)}, "start_from.strength"),
    ):
        with pytest.raises(GenerationFailed) as caught:
            draw(client, again(text, **beside))
        assert [violation.field for violation in caught.value.violations] == [field]
    assert images(draw(client, again(text, references=(REFERENCE,), **begun))) == [shown]


def test_other_weights_are_a_failed_precondition(
    host: Host, make_generator: Callable[..., Service], client: GeneratorClient, drawn: str, tmp_path: Path
) -> None:
    weights = json.loads(drawn)["weights"]
    with pytest.raises(GenerationFailed, match="stage 64 was drawn with the weights ffff") as caught:
        draw(client, again(edited(drawn, weights=weights | {"unet_64": "f" * 64})))
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "WEIGHTS_DIFFER")
    service = make_generator(weights=write_weights(tmp_path, examples=1))
    named = f"stage 64 was drawn with the weights {weights['unet_64'][:12]}"
    with (
        host.running(service) as address,
        GeneratorClient(address) as other,
        pytest.raises(GenerationFailed, match=named),
    ):
        draw(other, again(drawn))
    with pytest.raises(GenerationFailed, match="text encoder") as caught:
        draw(client, again(edited(drawn, text_encoder="another")))
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "WEIGHTS_DIFFER")


@contextmanager
def own_stack(
    host: Host, knowledge_base: Path, make_generator: Callable[..., Service], folder: Path
) -> Iterator[tuple[GeneratorClient, KnowledgeBases]]:
    """A generator before a knowledge base that may be changed."""
    shutil.copytree(knowledge_base / LIBRARY, folder / "data")
    with (
        host.running(retrieval_service(folder / "data", folder / "r.sock")) as address,
        KnowledgeBases(address) as bases,
        host.running(make_generator(retrieval_address=address)) as reached,
        GeneratorClient(reached) as client,
    ):
        yield client, bases


def test_a_pair_that_has_changed_or_is_gone_is_a_failed_precondition(
    host: Host, knowledge_base: Path, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    with own_stack(host, knowledge_base, make_generator, tmp_path) as (client, bases):
        events = draw(client, QUICK)
        (image,), used = images(events), found(events).neighbors
        text = read_record(image)
        other = next(pair for pair in bases.list_pairs(NAME) if pair.pair_id not in {n.pair_id for n in used})
        bases.delete_pairs(NAME, [other.pair_id])
        assert images(draw(client, again(text))) == [image], "another index, the same pairs"
        bases.delete_pairs(NAME, [used[0].pair_id])
        with pytest.raises(GenerationFailed, match=f"{used[0].pair_id!r} is gone") as caught:
            draw(client, again(text))
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "NEIGHBOR_GONE")


def test_retrieval_that_is_away_is_unavailable_even_where_it_can_be_drawn_without(
    host: Host, make_generator: Callable[..., Service], drawn: str, tmp_path: Path
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock", without_retrieval="draw")
    with (
        host.running(service) as address,
        GeneratorClient(address) as client,
        pytest.raises(GenerationFailed) as caught,
    ):
        draw(client, again(drawn))
    assert caught.value.code == "UNAVAILABLE"


def test_the_pictures_shape_is_read_again_and_not_believed(client: GeneratorClient, drawn: str) -> None:
    events = client.generate(again(drawn), timeout_s=TIMEOUT_S)
    neighbors = next(event for event in events if isinstance(event, NeighborsFound))
    assert all(neighbor.image.startswith(b"<svg") for neighbor in neighbors.neighbors)
    events.close()
    document = json.loads(drawn)
    document["neighbors"][0]["image_sha256"] = "0" * 64
    with pytest.raises(GenerationFailed, match="not what it was") as caught:
        draw(client, again(json.dumps(document)))
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "NEIGHBOR_CHANGED")
