"""`Client` and `AsyncClient` against the real services, with tiny weights; both are asked the same."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest

from client import AsyncClient, Client, GenerationFailed, GenerationRequest, RetrievalFailed, StageOverrides
from client.generation_types import Event, Image, NeighborsFound, StageFinished, StepDone
from client.retrieval_types import Lookup, Pair
from tests.client.canned import CannedGenerator, serving
from tests.generator_svc.tiny_stack import Service

TIMEOUT_S = 60.0
METHOD = "reimagen.generator.v1.GeneratorService/Generate"
PROMPT = "a guide dog, noto style, on a blue background"
QUICK = GenerationRequest(prompt=PROMPT, seed=7, stop_at=64, stages=(StageOverrides(stage=64, steps=2),))
TWO = GenerationRequest(
    prompt=PROMPT, seed=7, stop_at=256, stages=(StageOverrides(stage=64, steps=2), StageOverrides(stage=256, steps=2))
)
ENDLESS = GenerationRequest(prompt=PROMPT, stop_at=64, stages=(StageOverrides(stage=64, steps=1000),))


@pytest.fixture(scope="module")
def client(generator_address: str, retrieval_address: str) -> Iterator[Client]:
    """A client of the running stack."""
    with Client(generator_address, retrieval=retrieval_address, timeout_s=TIMEOUT_S) as connected:
        yield connected


@pytest.fixture
def ask_async(generator_address: str, retrieval_address: str) -> Callable[[Callable[[AsyncClient], Any]], Any]:
    """Runs a coroutine function with an `AsyncClient` of the running stack."""

    def run(body: Callable[[AsyncClient], Any]) -> Any:
        async def connected() -> Any:
            async with AsyncClient(generator_address, retrieval=retrieval_address, timeout_s=TIMEOUT_S) as client:
                return await body(client)

        return asyncio.run(connected())

    return run


@pytest.fixture(scope="module")
def told() -> list[Event]:
    """The events of `drawn`."""
    return []


@pytest.fixture(scope="module")
def drawn(client: Client, told: list[Event]) -> Any:
    """TWO, all of its stages."""
    return client.generate(TWO, on_event=told.append, every_stage=True)


def test_a_prompt_and_knobs_become_a_picture_with_its_record(client: Client) -> None:
    result = client.generate(PROMPT, seed=7, stop_at=64, stages=QUICK.stages)
    (image,) = result.images
    assert (image.picture, image.seed, image.image_format) == (0, 7, "png")
    assert image.record["prompt"] == PROMPT and result.record["timings_s"]["total"] > 0
    assert [neighbor.license for neighbor in result.neighbors.neighbors] == ["CC-BY-4.0"] * 2
    assert [neighbor.author for neighbor in result.neighbors.neighbors] == ["author of noto", "author of twemoji"]


def test_a_knob_that_there_is_not_is_refused(client: Client) -> None:
    with pytest.raises(TypeError, match="speed"):
        client.generate(PROMPT, speed=7)


def test_progress_is_told_on_the_way(drawn: Any, told: list[Event]) -> None:
    steps = [(event.stage, event.step, event.steps) for event in told if isinstance(event, StepDone)]
    assert steps == [(64, 1, 2), (64, 2, 2), (256, 1, 2), (256, 2, 2)]
    assert any(isinstance(event, NeighborsFound) for event in told)


def test_every_stage_is_given(drawn: Any) -> None:
    (finished,) = drawn.stages
    assert (finished.stage, finished.picture, finished.pil().size) == (64, 0, (64, 64))
    assert drawn.images[0].pil().size == (256, 256)


def test_a_picture_is_kept_and_opened(drawn: Any, tmp_path: Path) -> None:
    image: Image = drawn.images[0]
    path = image.save(tmp_path / "deep" / "dog.png")
    assert path.read_bytes() == image.image == (tmp_path / "deep" / "dog.png").read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["dog.png"], "nothing temporary is left"
    array = image.array()
    assert (array.shape, str(array.dtype)) == ((256, 256, 3), "uint8")
    assert image.pil().convert("RGB").tobytes() == array.tobytes()


def test_events_are_iterated_and_closing_cancels(client: Client, generator: Service) -> None:
    with closing(client.events(ENDLESS)) as events:
        assert any(isinstance(event, StepDone) for event in events)
    _until_idle(generator)


def test_an_error_in_the_callback_cancels(client: Client, generator: Service) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, StepDone):
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        client.generate(ENDLESS, on_event=fail)
    _until_idle(generator)


def test_asyncio_gives_the_same(ask_async: Any, drawn: Any) -> None:
    told: list[Event] = []
    result = ask_async(lambda client: client.generate(TWO, on_event=told.append, every_stage=True))
    assert [image.image for image in result.images] == [image.image for image in drawn.images]
    assert [stage.image for stage in result.stages] == [stage.image for stage in drawn.stages]
    assert result.neighbors.neighbors == drawn.neighbors.neighbors
    assert [type(event) for event in told].count(StageFinished) == 2


def test_asyncio_cancels(ask_async: Any, generator: Service) -> None:
    async def cancelled(client: AsyncClient) -> None:
        started = asyncio.Event()
        task = asyncio.create_task(client.generate(ENDLESS, on_event=lambda event: started.set()))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with aclosing(client.events(ENDLESS)) as events:
            async for event in events:
                if isinstance(event, StepDone):
                    break

    ask_async(cancelled)
    _until_idle(generator)


def test_asyncio_runs_beside_itself(ask_async: Any, drawn: Any) -> None:
    async def many(client: AsyncClient) -> Any:
        return await asyncio.gather(*(client.generate(TWO) for _ in range(3)))

    for result in ask_async(many):
        assert _is_same(result, drawn)


def test_refusals_name_the_field(client: Client, ask_async: Any) -> None:
    with pytest.raises(GenerationFailed) as caught:
        client.generate(QUICK, num_pictures=9)
    with pytest.raises(GenerationFailed) as again:
        ask_async(lambda client: client.generate(QUICK, num_pictures=9))
    for failure in (caught.value, again.value):
        assert (failure.code, [v.field for v in failure.violations]) == ("INVALID_ARGUMENT", ["num_pictures"])
    for method in (client.generate, lambda what: list(client.events(what))):
        with pytest.raises(ValueError, match="method: 'magic' is not one of bm25, clip, hybrid"):
            method(GenerationRequest(prompt=PROMPT, method="magic"))


def test_a_deadline_ends_it(client: Client, ask_async: Any) -> None:
    with pytest.raises(GenerationFailed) as caught:
        client.generate(ENDLESS, timeout_s=0.5)
    with pytest.raises(GenerationFailed) as again:
        ask_async(lambda client: client.generate(ENDLESS, timeout_s=0.5))
    assert caught.value.code == again.value.code == "DEADLINE_EXCEEDED"


def test_health_of_each_service(client: Client, ask_async: Any, generator_address: str, tmp_path: Path) -> None:
    names = [
        "reimagen.generator.v1.GeneratorService",
        "reimagen.retrieval.v1.RetrievalService",
        "reimagen.retrieval.v1.KnowledgeBaseService",
    ]
    for found in (client.health(), ask_async(lambda client: client.health())):
        assert [(health.service, health.status) for health in found] == [(name, "SERVING") for name in names]
        assert all(health.is_serving for health in found)
    with Client(generator_address, retrieval=f"unix:{tmp_path}/nobody") as half:
        first, second, third = half.health()
    assert first.is_serving and second.status == third.status == "UNAVAILABLE" and second.reason


def test_knowledge_bases(client: Client, ask_async: Any) -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="9" height="9" fill="red"/></svg>'
    pair = Pair(pair_id="mine", caption="garden gnome", image=svg, author="me", license="CC0-1.0")
    bases = client.knowledge_bases
    bases.create("gnomes")
    assert [outcome.outcome for outcome in bases.upsert("gnomes", [pair])] == ["created"]

    async def look(client: AsyncClient) -> Any:
        bases = client.knowledge_bases
        assert [base.name async for base in bases.list()] == ["demo", "gnomes"]
        assert [outcome.outcome async for outcome in bases.upsert("gnomes", [pair])] == ["unchanged"]
        assert [stored.pair_id async for stored in bases.list_pairs("gnomes")] == ["mine"]
        assert (await bases.get("gnomes", "mine")).image == svg
        while (await bases.stats("gnomes")).num_indexed_pairs < 1:  # a lookup sees it within a second
            await asyncio.sleep(0.02)
        found = await bases.retrieve(Lookup(prompt="garden gnome", knowledge_base="gnomes", k=1))
        assert await bases.delete_pairs("gnomes", ["mine", "other"]) == 1
        await bases.create("more")
        await bases.delete("more")
        with pytest.raises(RetrievalFailed, match="NOT_FOUND"):
            await bases.stats("more")
        return found

    try:
        (neighbor,) = ask_async(look).neighbors
    finally:
        bases.delete("gnomes")  # with one knowledge base alone, requests need not name it
    assert (neighbor.pair.author, neighbor.pair.license, neighbor.pair.image) == ("me", "CC0-1.0", svg)


def test_what_has_no_address_is_said(generator_address: str, retrieval_address: str) -> None:
    with Client(generator_address) as client, pytest.raises(ValueError, match="retrieval: the client was given no"):
        _ = client.knowledge_bases
    with Client(retrieval=retrieval_address) as client, pytest.raises(ValueError, match="generator: the client was"):
        client.generate(PROMPT)


def test_models_of_a_canned_generator() -> None:
    with serving(CannedGenerator()) as address, Client(address) as client:
        models = client.models()
    (stage,) = models.stages
    assert (models.text_encoder, stage.name, stage.version, stage.parameters) == ("minilm", "unet_64", "3", 1234)
    assert (stage.trained, stage.default_plan, stage.endpoints) == ({"examples": 5}, {"steps": 8}, ("a:1", "b:2"))


def test_a_canned_stream_that_is_cut_is_no_result() -> None:
    with (
        serving(CannedGenerator()) as address,
        Client(address) as client,
        pytest.raises(GenerationFailed, match="ended the stream before everything was drawn"),
    ):
        client.generate("cut")


def test_calls_go_to_canned_replicas_by_turns() -> None:
    first, second = CannedGenerator(), CannedGenerator()
    with serving(first) as one, serving(second) as other:
        with Client(f"ipv4:{one},{other}") as client:
            deadline = time.monotonic() + TIMEOUT_S
            while not (first.requests and second.requests):  # the second one may still be connecting
                client.generate("p")
                assert time.monotonic() < deadline
            before = len(first.requests), len(second.requests)
            for _ in range(10):
                client.generate("p")
        assert (len(first.requests) - before[0], len(second.requests) - before[1]) == (5, 5)


def test_a_replica_that_is_gone_is_left_out_of_canned_ones() -> None:
    first, second = CannedGenerator(), CannedGenerator()
    with serving(second) as other:
        with serving(first) as one:
            client = Client(f"ipv4:{one},{other}")
            client.generate("p")
        for _ in range(4):
            assert client.generate("p").images
        client.close()
    assert len(first.requests) + len(second.requests) == 5


def test_a_key_travels_with_every_call_to_a_canned_generator() -> None:
    service = CannedGenerator()
    with serving(service) as address, Client(address, api_key="secret") as client:
        client.generate("p")
        client.generate_images("p")
    assert [said["authorization"] for said in service.metadata] == ["Bearer secret"] * 2


def test_one_client_serves_several_threads(client: Client, drawn: Any) -> None:
    results: list[Any] = []

    def draw() -> None:
        results.append(client.generate(TWO))

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(results) == 3 and all(_is_same(result, drawn) for result in results)


def test_the_record_is_text_that_travels(drawn: Any) -> None:
    image: Image = drawn.images[0]
    assert json.loads(image.record_json) == image.record != {}


def _is_same(result: Any, other: Any) -> bool:
    """The same pictures, up to what drawing beside others may change: 1/255 a channel."""
    pairs = zip(result.images, other.images, strict=True)
    return all(abs(one.array().astype(int) - two.array()).max() <= 1 for one, two in pairs)


def _until_idle(generator: Service) -> None:
    """Wait until nothing is being drawn."""
    give_up = time.monotonic() + 10
    while generator.figure("reimagen_server_calls_in_flight", grpc_method=METHOD) or generator.figure(
        "reimagen_generator_taken_bytes", stage=64
    ):
        assert time.monotonic() < give_up, "the call was not cancelled"
        time.sleep(0.02)
