"""Every field of the contract, changed alone, changes what comes back."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures
from reimagen.generator.v1 import generator_pb2 as pb

from client.generator import (
    Accepted,
    Event,
    GenerationFailed,
    GenerationRequest,
    GeneratorClient,
    Image,
    Reference,
    StageFinished,
    StageOverrides,
    StageStarted,
    StartFrom,
    StepDone,
)
from client.picture_record import read_record
from common.images import decode_rgb, encode_png
from tests.generator_svc.asking import QUICK, REQUEST, SIZES, TIMEOUT_S, draw, found, images, pixels, record
from tests.generator_svc.tiny_stack import Host, Service

SIX_STEPS = replace(QUICK, stages=(StageOverrides(stage=64, steps=6),))
TO_256 = replace(REQUEST, stop_at=256, stages=REQUEST.stages[:2])


def svg(color: str, width: int = 16) -> bytes:
    """A colored square, or a part of it."""
    shape = f'<rect x="0" y="0" width="{width}" height="16" fill="{color}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{shape}</svg>'.encode()


REFERENCE = Reference(image=svg("red"), caption="my dog", author="me", source="a camera", license="CC0-1.0")
WITH_REFERENCE = replace(SIX_STEPS, references=(REFERENCE,))
FROM_PICTURE = replace(SIX_STEPS, start_from=StartFrom(image=svg("red"), strength=0.5))


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A field, a request without it (or with another value), and what it changes there."""

    field: str
    change: dict[str, Any]
    base: GenerationRequest = SIX_STEPS
    seen: Callable[[list[Event]], Any] = lambda events: pixels(events).tobytes()


def stage(base: GenerationRequest = SIX_STEPS, **changes: Any) -> dict[str, Any]:
    return {"stages": (*base.stages[:-1], replace(base.stages[-1], **changes))}


def first_reference(**changes: Any) -> dict[str, Any]:
    return {"references": (replace(REFERENCE, **changes),)}


def start(**changes: Any) -> dict[str, Any]:
    assert FROM_PICTURE.start_from is not None
    return {"start_from": replace(FROM_PICTURE.start_from, **changes)}


def kept_of_references(events: list[Event]) -> Any:
    return [(n["author"], n["source"], n["license"]) for n in record(events)["neighbors"]]


def num_stage_pictures(events: list[Event]) -> int:
    return sum(isinstance(event, StageFinished) and bool(event.image) for event in events)


KNOBS = [
    Knob(field="prompt", change={"prompt": "a red apple, noto style"}),
    Knob(field="k", change={"k": 1}),
    Knob(field="k", change={"k": 2}, base=WITH_REFERENCE),
    Knob(field="knowledge_base", change={"knowledge_base": "big"}, seen=lambda events: "refused"),
    Knob(field="method", change={"method": "clip"}, seen=lambda events: "refused"),
    Knob(field="excluded_pair_ids", change={"excluded_pair_ids": ("twemoji--guide-dog",)}),
    Knob(field="exclude_exact", change={"exclude_exact": True}),
    Knob(field="without_neighbors", change={"without_neighbors": True}),
    Knob(field="num_pictures", change={"num_pictures": 2}, seen=lambda events: len(images(events))),
    Knob(field="seed", change={"seed": 8}),
    Knob(field="seeds", change={"seed": None, "seeds": (8,)}),
    Knob(field="stop_at", change={"stop_at": 256}),
    Knob(field="stages.steps", change=stage(steps=3)),
    Knob(field="stages.sampler", change=stage(sampler="ddpm")),
    Knob(field="stages.guidance_strategy", change=stage(guidance_strategy="joint")),
    Knob(field="stages.text_weight", change=stage(text_weight=9.0)),
    Knob(field="stages.neighbor_weight", change=stage(neighbor_weight=9.0)),
    Knob(field="stages.eta", change=stage(eta=0.1)),
    Knob(field="stages.thresholding", change=stage(thresholding="none")),
    Knob(field="stages.augmentation", change=stage(TO_256, augmentation=0.2), base=TO_256),
    Knob(
        field="preview_every",
        change={"preview_every": 2},
        seen=lambda events: [bool(event.preview_png) for event in events if isinstance(event, StepDone)],
    ),
    Knob(field="negative_prompt", change={"negative_prompt": "a steam locomotive"}),
    Knob(
        field="negative_prompt",
        change={"negative_prompt": "a red apple"},
        base=replace(SIX_STEPS, negative_prompt="a steam locomotive"),
    ),
    Knob(field="references.image", change=first_reference(image=svg("red", width=7)), base=WITH_REFERENCE),
    Knob(field="references.caption", change=first_reference(caption="your cat"), base=WITH_REFERENCE),
    Knob(field="references.author", change=first_reference(author="you"), base=WITH_REFERENCE, seen=kept_of_references),
    Knob(
        field="references.source", change=first_reference(source="a pen"), base=WITH_REFERENCE, seen=kept_of_references
    ),
    Knob(
        field="references.license", change=first_reference(license="MIT"), base=WITH_REFERENCE, seen=kept_of_references
    ),
    Knob(field="start_from.image", change=start(image=svg("blue")), base=FROM_PICTURE),
    Knob(field="start_from.strength", change=start(strength=0.7), base=FROM_PICTURE),
    Knob(
        field="start_from.stage",
        change={"start_from": StartFrom(image=svg("red"), stage=256), "stages": ()},
        base=replace(TO_256, start_from=StartFrom(image=svg("red")), stages=()),
    ),
    Knob(field="image_format", change={"image_format": "webp"}, seen=lambda events: images(events)[0][:4]),
    Knob(field="every_stage", change={"every_stage": False}, base=TO_256, seen=num_stage_pictures),
    Knob(field="record_json", change={}, seen=lambda events: "test_record_again.py"),
    Knob(field="priority", change={"priority": "low"}, seen=lambda events: "admission"),
    Knob(field="request_id", change={"request_id": "x"}, seen=lambda events: "admission"),
]
ELSEWHERE = {"knowledge_base", "method", "record_json", "priority", "request_id"}


@pytest.mark.parametrize("knob", [knob for knob in KNOBS if knob.field not in ELSEWHERE], ids=lambda knob: knob.field)
def test_a_field_changed_alone_changes_what_comes_back(client: GeneratorClient, knob: Knob) -> None:
    before, after = draw(client, knob.base), draw(client, replace(knob.base, **knob.change))
    assert knob.seen(before) != knob.seen(after)


def test_no_field_of_the_contract_is_forgotten() -> None:
    nested = {"stages": pb.StageOverrides, "references": pb.Reference, "start_from": pb.StartFrom}
    fields: set[str] = set()
    for field in pb.GenerateRequest.DESCRIPTOR.fields:
        parts = nested[field.name].DESCRIPTOR.fields if field.name in nested else []
        fields |= {f"{field.name}.{part.name}" for part in parts} or {field.name}
    assert {knob.field for knob in KNOBS} == fields - {"stages.stage"}, "stages.stage: see test_order.py"


def test_a_reference_is_seen_as_the_same_pair_retrieved_is(client: GeneratorClient) -> None:
    retrieved = draw(client, replace(SIX_STEPS, k=1))
    (neighbor,) = found(retrieved).neighbors
    given = replace(SIX_STEPS, references=(Reference(image=neighbor.image, caption=neighbor.caption),))
    assert (pixels(draw(client, given)) == pixels(retrieved)).all()


def test_references_go_ahead_of_what_is_retrieved(client: GeneratorClient) -> None:
    neighbors = found(draw(client, replace(WITH_REFERENCE, k=2)))
    assert neighbors.num_references == 1 and neighbors.method == "bm25"
    first, *others = neighbors.neighbors
    assert (first.caption, first.author, first.license, first.pair_id) == ("my dog", "me", "CC0-1.0", "")
    assert [neighbor.entity for neighbor in others] == ["guide dog", "guide dog"]
    assert [neighbor.rank for neighbor in neighbors.neighbors] == [1, 2, 3]
    alone = found(draw(client, WITH_REFERENCE))
    assert (len(alone.neighbors), alone.num_references, alone.method) == (1, 1, "unspecified")


def test_with_references_alone_retrieval_is_not_asked(
    host: Host, make_generator: Callable[..., Service], tmp_path: Any
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock")
    with host.running(service) as address, GeneratorClient(address) as client:
        assert images(draw(client, WITH_REFERENCE))
        enlarged = replace(TO_256, start_from=StartFrom(image=svg("red"), stage=256), stages=())
        assert images(draw(client, enlarged)), "no stage that is run reads neighbors"


@pytest.mark.parametrize("extension", ["PNG", "JPEG", "WEBP"])
def test_references_are_files_of_any_kind(client: GeneratorClient, extension: str) -> None:
    picture = Pictures.fromarray(np.full((40, 30, 3), (250, 10, 10), np.uint8))
    stream = io.BytesIO()
    picture.save(stream, extension)
    given = replace(WITH_REFERENCE, references=(replace(REFERENCE, image=stream.getvalue()),))
    assert images(draw(client, given))


def test_each_seed_draws_what_it_draws_alone(client: GeneratorClient) -> None:
    events = draw(client, replace(SIX_STEPS, seed=None, seeds=(5, 7, 5)))
    accepted = events[0]
    assert isinstance(accepted, Accepted)
    assert (accepted.seeds, accepted.num_pictures) == ((5, 7, 5), 3)
    drawn = [event for event in events if isinstance(event, Image)]
    assert [(image.picture, image.seed) for image in drawn] == [(0, 5), (1, 7), (2, 5)]
    alone = draw(client, SIX_STEPS)
    assert np.abs(pixels(events, 1) - pixels(alone)).max() <= 1
    (single,) = [event for event in alone if isinstance(event, Image)]
    assert drawn[1].record_json == single.record_json
    assert np.abs(pixels(events, 0) - pixels(events, 2)).max() <= 1


@pytest.mark.parametrize(("image_format", "kind"), [("png", "PNG"), ("webp", "WEBP")])
def test_both_formats_hold_the_picture_and_its_record(client: GeneratorClient, image_format: str, kind: str) -> None:
    events = draw(client, replace(QUICK, prompt="a <dog> & ünïcode, noto style", image_format=image_format))
    (image,) = [event for event in events if isinstance(event, Image)]
    assert (image.image_format, image.seed) == (image_format, 7)
    with Pictures.open(io.BytesIO(image.image)) as opened:
        assert opened.format == kind
    assert read_record(image.image) == image.record_json
    assert image.record["prompt"] == "a <dog> & ünïcode, noto style"
    png = draw(client, replace(QUICK, prompt="a <dog> & ünïcode, noto style"))
    assert (decode_rgb(image.image) == pixels(png)).all(), "something is lost"


def test_the_stages_come_in_the_format_that_is_asked_for(client: GeneratorClient) -> None:
    events = draw(client, replace(TO_256, image_format="webp"))
    stages = [event for event in events if isinstance(event, StageFinished) and event.image]
    assert [stage.stage for stage in stages] == [64]
    assert stages[0].image[8:12] == b"WEBP"


def test_one_answer_holds_what_the_stream_tells(client: GeneratorClient) -> None:
    request = replace(TO_256, num_pictures=2)
    events, whole = draw(client, request), client.generate_images(request, timeout_s=TIMEOUT_S)
    assert [image.image for image in whole.images] == images(events)
    assert list(whole.images) == [event for event in events if isinstance(event, Image)]
    assert list(whole.stages) == [event for event in events if isinstance(event, StageFinished) and event.image]
    assert whole.neighbors == found(events)
    timeless = {name: value for name, value in whole.record.items() if name != "timings_s"}
    assert timeless == {name: value for name, value in record(events).items() if name != "timings_s"}


@pytest.mark.parametrize(
    ("changes", "field"), [({"prompt": ""}, "prompt"), ({"k": 65}, "k"), ({"preview_every": 2}, "preview_every")]
)
def test_one_answer_refuses_by_the_fields_place_in_it(
    client: GeneratorClient, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(GenerationFailed) as caught:
        client.generate_images(replace(QUICK, **changes), timeout_s=TIMEOUT_S)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [violation.field for violation in caught.value.violations] == [f"request.{field}"]


def test_what_is_drawn_with_is_told(client: GeneratorClient) -> None:
    models, whole = client.models(), record(draw(client, TO_256))
    assert [(model.stage, model.name) for model in models.stages] == [(size, f"unet_{size}") for size in SIZES]
    assert models.text_encoder == whole["text_encoder"]
    for model in models.stages[:2]:
        assert model.weights_sha256 == whole["weights"][model.name]
        assert model.version == whole["models"][model.name]
        assert model.endpoints == ("in process",) and model.parameters > 1000
        assert model.trained == {"examples": 0}
    (plan,) = [plan for plan in whole["plans"] if plan["stage"] == 256]
    assert {**plan, **models.stages[1].default_plan, "steps": 2} == plan


def test_a_stages_picture_goes_on_as_if_it_had_never_left(client: GeneratorClient) -> None:
    events = draw(client, TO_256)
    (small,) = [event.image for event in events if isinstance(event, StageFinished) and event.image]
    again = draw(client, replace(TO_256, start_from=StartFrom(image=small, stage=256), stages=TO_256.stages[1:]))
    assert [event.stage for event in again if isinstance(event, StageStarted)] == [256]
    assert found(again).neighbors == ()
    assert np.abs(pixels(again) - pixels(events)).mean() < 0.5, "more than the rounding to 8 bits"


def test_the_weaker_the_more_of_the_picture_is_kept(client: GeneratorClient) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 8:40] = (30, 160, 220)
    shown = encode_png(picture)

    def distance(strength: float) -> float:
        events = draw(client, replace(SIX_STEPS, start_from=StartFrom(image=shown, strength=strength)))
        return float(np.abs(pixels(events) - picture).mean())

    # A network of random numbers keeps nothing by itself: what is kept, x_start alone carries.
    assert pixels(draw(client, FROM_PICTURE)).tobytes() != pixels(draw(client, SIX_STEPS)).tobytes()
    assert distance(0.01) < distance(0.9)


def test_a_large_picture_is_shrunk_for_super_resolution(client: GeneratorClient) -> None:
    def enlarged(image: bytes) -> np.ndarray:
        return pixels(draw(client, replace(TO_256, start_from=StartFrom(image=image, stage=256), stages=())))

    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    large = np.repeat(np.repeat(small, 4, 0), 4, 1)
    assert np.abs(enlarged(encode_png(large)) - enlarged(encode_png(small))).max() <= 1


def names(events: Sequence[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


@pytest.mark.parametrize("given", [1, 0.001])
def test_the_ends_of_what_strength_may_be_are_drawn(client: GeneratorClient, given: float) -> None:
    request = replace(TO_256, start_from=StartFrom(image=svg("red"), stage=256, strength=given), stages=())
    assert names(draw(client, request))[-1] == "Done"
