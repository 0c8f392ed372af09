"""What the contract offers beyond a prompt, through the client to the real services, with tiny weights."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client import Client, GenerationFailed, Reference, StartFrom
from client.generation_types import Accepted, Event
from client.generation_types import Image as Drawn
from tests.client.test_client import QUICK, TWO, _is_same
from tests.generator_svc.tiny_stack import Host

# Weights that are random draw what they are guided to.
GUIDED = replace(QUICK, stages=(replace(QUICK.stages[0], text_weight=2.0, neighbor_weight=6.0),))


@pytest.fixture(scope="module")
def client(generator_address: str) -> Iterator[Client]:
    """A client of the running generator."""
    with Client(generator_address) as connected:
        yield connected


def picture(color: str) -> bytes:
    """A PNG of one color."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(stream, "PNG")
    return stream.getvalue()


def distance(one: Any, other: Any) -> float:
    """Mean difference of a channel."""
    return abs(one.astype(float) - other).mean()


def test_one_answer_is_what_the_stream_brings(client: Client) -> None:
    whole = client.generate_images(TWO, every_stage=True)
    streamed = client.generate(TWO, every_stage=True)
    assert _is_same(whole, streamed)
    assert [(s.stage, s.picture, s.image) for s in whole.stages] == [
        (s.stage, s.picture, s.image) for s in streamed.stages
    ]
    assert whole.neighbors == streamed.neighbors and whole.record["plans"] == streamed.record["plans"]


def test_a_record_draws_the_picture_again(client: Client) -> None:
    both = client.generate(QUICK, num_pictures=2, image_format="webp")
    second = replace(both, images=both.images[1:])
    again = client.generate("", record_json=second.images[0].record_json, image_format="webp")
    assert _is_same(again, second) and not _is_same(again, replace(both, images=both.images[:1]))
    assert (again.images[0].image_format, again.images[0].pil().format) == ("webp", "WEBP")
    assert again.images[0].record_json == second.images[0].record_json


def test_seeds_are_those_of_single_pictures(client: Client) -> None:
    told: list[Event] = []
    both = client.generate(replace(QUICK, seed=None), seeds=(3, 4), on_event=told.append)
    (accepted,) = (event for event in told if isinstance(event, Accepted))
    assert accepted.seeds == (3, 4) == tuple(image.seed for image in both.images)
    assert _is_same(replace(both, images=both.images[1:]), client.generate(QUICK, seed=4))


def test_references_come_first_and_are_needed_again(client: Client) -> None:
    mine = Reference(image=picture("orange"), caption="my orange dog", author="me", license="CC0-1.0")
    drawn = client.generate(QUICK, references=(mine,), k=1)
    first, second = drawn.neighbors.neighbors
    assert (first.caption, first.license, second.license) == ("my orange dog", "CC0-1.0", "CC-BY-4.0")
    assert drawn.neighbors.num_references == 1
    record = drawn.images[0].record_json
    again = client.generate("", record_json=record, references=(mine,))
    assert _is_same(again, drawn)
    with pytest.raises(GenerationFailed) as caught:
        client.generate("", record_json=record)
    assert [violation.field for violation in caught.value.violations] == ["references"]


def test_a_drawing_begins_with_a_picture(client: Client) -> None:
    orange = Drawn(picture=0, image=picture("orange")).array()
    kept, lost = (
        client.generate(GUIDED, start_from=StartFrom(image=picture("orange"), strength=strength)).images[0].array()
        for strength in (0.05, 0.95)
    )
    assert distance(kept, orange) < distance(lost, orange), "a small strength keeps the picture"
    larger = client.generate(
        replace(TWO, stages=TWO.stages[1:]), start_from=StartFrom(image=picture("orange"), stage=256)
    )
    assert larger.images[0].pil().size == (256, 256) and [p["stage"] for p in larger.record["plans"]] == [256]


def test_one_id_is_drawn_once(client: Client) -> None:
    name = str(uuid.uuid4())
    first = client.generate(replace(QUICK, seed=None), request_id=name)
    assert client.generate(replace(QUICK, seed=None), request_id=name).images == first.images, "another seed otherwise"
    with pytest.raises(GenerationFailed) as caught:
        client.generate(QUICK, request_id=name)
    assert [violation.field for violation in caught.value.violations] == ["request_id"]


def test_drawing_without_retrieval_is_told(host: Host, make_generator: Callable[..., Any], tmp_path: Path) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody", without_retrieval="draw")
    with host.running(service) as address, Client(address) as client:
        drawn = client.generate(QUICK)
    assert drawn.neighbors.degraded_reason and not drawn.neighbors.neighbors


def test_the_models_are_those_that_draw(client: Client) -> None:
    models = client.models()
    assert [stage.stage for stage in models.stages] == [64, 256, 1024]
    drawn = client.generate(QUICK)
    assert models.stages[0].weights_sha256 == drawn.record["weights"]["unet_64"]
    assert models.stages[0].default_plan["stage"] == 64 and models.stages[0].endpoints and models.text_encoder
