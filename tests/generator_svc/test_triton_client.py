"""What a real Triton answers, and what the generator makes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import grpc
import numpy as np
import pytest

from common.service.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, ServiceError
from common.service.status import code_of
from common.stages import stage
from deploy.local.tritonserver import TritonServer, TritonSettings, running_triton
from generator_svc.call import Call
from generator_svc.stage_tensors import StageRequest, pack_error, pack_request
from generator_svc.triton_client import TritonClient
from generator_svc.triton_errors import EndpointFailed, QueueRefused, RequestRefused, explain, kind_of
from generator_svc.triton_stage import TritonTexts
from tests.generator_svc.served import asked
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import Host
from tests.generator_svc.triton_server import figure

PASSES, LIVE = "reimagen_stage_passes_total", "reimagen_stage_live_requests"
STEP_LIMIT = 1000
SEVERAL = 6  # pictures, so that a pass of tiny networks takes longer than a message on a busy machine
COUNTED_S = 1.2  # a stage tells its passes now and then
QUEUE = """
name: "slow"
backend: "python"
max_batch_size: 1
input { name: "texts" data_type: TYPE_UINT8 dims: [ -1 ] }
output { name: "texts" data_type: TYPE_UINT8 dims: [ -1 ] }
dynamic_batching { default_queue_policy {
  timeout_action: REJECT default_timeout_microseconds: 100000 allow_timeout_override: true max_queue_size: 4 } }
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
SLOW = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.15)
        slept = pb_utils.TritonError("slept", pb_utils.TritonError.CANCELLED)
        return [pb_utils.InferenceResponse(error=slept) for _ in requests]
"""

# The texts are those of Triton 2.51 and gRPC, word for word.
FAILURES = [
    (grpc.StatusCode.INTERNAL, "Stub process 'unet_64_0_0' is not healthy.", "stub_dead", True),
    (
        None,
        "Server is stopping, scheduler for model has stopped accepting new inference requests",
        "stopping",
        True,
    ),
    (
        grpc.StatusCode.UNAVAILABLE,
        "[request id: <id_unknown>] Server is stopping, scheduler for model has stopped accepting new inference requests",
        "stopping",
        True,
    ),
    (None, "Request for unknown model: 'unet_64' has no available versions", "not_loaded", True),
    (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'unet_64' is not found", "not_loaded", True),
    (
        grpc.StatusCode.UNAVAILABLE,
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to connect to remote host: "
        "Connection refused",
        "unreachable",
        True,
    ),
    (grpc.StatusCode.UNAVAILABLE, "Stream removed (Socket closed)", "unreachable", True),
    (grpc.StatusCode.UNAVAILABLE, "fault filter abort", "other", False),
    (
        grpc.StatusCode.INTERNAL,
        "Failed to process the request(s) for model 'unet_64_0_0', message: ValueError: a bug\n\nAt:\n  model.py(20)",
        "raised",
        False,
    ),
    (grpc.StatusCode.UNAVAILABLE, pack_error(ServiceError("stage 64 failed (ValueError)")), "raised", False),
]


@pytest.mark.parametrize(("code", "text", "kind", "is_down"), FAILURES)
def test_failures_of_an_endpoint(code: grpc.StatusCode | None, text: str, kind: str, is_down: bool) -> None:
    error = explain(code, text, where="unet_64 at 127.0.0.1:1")
    assert isinstance(error, EndpointFailed)
    assert (error.kind, error.is_down) == (kind, is_down)
    assert code_of(error) is grpc.StatusCode.UNAVAILABLE
    assert error.description.startswith("unet_64 at 127.0.0.1:1")
    assert "\n" not in error.description, "no stack of another process is given away"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[request id: <id_unknown>] Exceeds maximum queue size", "queue_full"),
        ("Request timeout expired", "queue_timeout"),
    ],
)
def test_a_queue_that_refuses_is_no_reason_to_try_elsewhere(text: str, kind: str) -> None:
    error = explain(grpc.StatusCode.UNAVAILABLE, text, where="there")
    assert isinstance(error, QueueRefused)
    assert (kind_of(error), code_of(error)) == (kind, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert error.retry_after_s


def test_what_a_model_says_is_what_it_means() -> None:
    full = explain(
        grpc.StatusCode.UNAVAILABLE, pack_error(ResourceExhausted("no room", retry_after_s=5)), where="there"
    )
    assert isinstance(full, ResourceExhausted)
    assert (full.description, full.retry_after_s, kind_of(full)) == ("no room", 5, None)
    late = explain(grpc.StatusCode.UNAVAILABLE, pack_error(DeadlineExceeded("late")), where="there")
    assert isinstance(late, DeadlineExceeded)


def client_of(host: Host, address: str) -> TritonClient:
    async def made() -> TritonClient:
        return TritonClient(address)

    return host.call(made())


@pytest.fixture
def triton(host: Host, triton_server: TritonServer) -> Iterator[TritonClient]:
    client = client_of(host, triton_server.address)
    yield client
    host.call(client.close())


def failure_of(host: Host, client: TritonClient, model: str, tensors: dict[str, np.ndarray]) -> Exception:
    async def ask() -> Exception:
        try:
            async with aclosing(client.stream(model, tensors, timeout_s=20.0)) as answers:
                async for _ in answers:
                    pass
        except Exception as error:
            return error
        raise AssertionError("it was answered")

    return host.call(ask())


def test_requests_that_cannot_be(host: Host, triton: TritonClient) -> None:
    good = pack_request(StageRequest(plans=plans(64, 1, 2), inputs=text_inputs(1, 2)))
    unknown = failure_of(host, triton, "unet_65", good)
    assert isinstance(unknown, EndpointFailed)
    assert unknown.kind == "not_loaded"
    wrong_type = failure_of(host, triton, "unet_64", good | {"text": good["text"].astype(np.int32)})
    wrong_shape = failure_of(host, triton, "unet_64", good | {"text": good["text"][0]})
    for refused in (wrong_type, wrong_shape):
        assert isinstance(refused, RequestRefused)
        assert code_of(refused) is grpc.StatusCode.INTERNAL, "it is no caller's mistake"
    incomplete = failure_of(host, triton, "unet_64", {name: t for name, t in good.items() if name != "text"})
    assert isinstance(incomplete, InvalidArgument)
    assert incomplete.violations[0][0] == "text"


def test_nobody_listens(host: Host) -> None:
    client = client_of(host, "127.0.0.1:1")
    error = failure_of(host, client, "unet_64", pack_request(StageRequest(plans=(), inputs=None)))
    assert isinstance(error, EndpointFailed)
    assert (error.kind, error.is_down) == ("unreachable", True)
    host.call(client.close())


def test_a_full_queue_and_a_slow_one(host: Host, tmp_path: Path) -> None:
    (tmp_path / "models" / "slow" / "1").mkdir(parents=True)
    (tmp_path / "models" / "slow" / "config.pbtxt").write_text(QUEUE)
    (tmp_path / "models" / "slow" / "1" / "model.py").write_text(SLOW)
    with running_triton(TritonSettings(repository=tmp_path / "models", log=tmp_path / "log")) as server:
        client = client_of(host, server.address)

        async def ask() -> str:
            try:
                await client.infer("slow", {"texts": np.zeros((1, 1), np.uint8)}, timeout_s=10.0)
            except Exception as error:
                return getattr(error, "kind", type(error).__name__)
            return "answered"

        async def ask_short() -> list[str]:
            short = {"timeout_s": 0.05}
            first = asyncio.create_task(ask())
            await asyncio.sleep(0.05)
            try:
                await client.infer("slow", {"texts": np.zeros((1, 1), np.uint8)}, **short)
            except Exception as error:
                said = type(error).__name__
            return [await first, said]

        async def ask_many() -> Counter[str]:
            return Counter(await asyncio.gather(*(ask() for _ in range(12))))

        said = host.call(ask_many())
        assert said["queue_full"] >= 6, said
        assert said["queue_full"] + said["queue_timeout"] + said["other"] == 12, said
        assert host.call(ask_short())[1] in ("DeadlineExceeded", "QueueRefused")
        host.call(client.close())


def test_steps_and_previews_come_as_they_are_taken(host: Host, triton_server: TritonServer) -> None:
    seen: list[tuple[int, int, bool]] = []

    def on_step(picture: int, step: int, x0: np.ndarray | None) -> None:
        assert x0 is None or (x0.shape == (3, 64, 64) and x0.dtype == np.float32 and abs(x0).max() <= 1)
        seen.append((picture, step, x0 is not None))

    async def ask() -> None:
        async with asked(64, triton_server.address) as asking:
            order = plans(64, 7, 6, num_pictures=2), text_inputs(3, 2)
            pictures, info = await asking.draw(*order, on_step=on_step, preview_every=3)
            assert pictures.shape == (2, 3, 64, 64)
            assert pictures.dtype == np.float32
            again, _ = await asking.draw(*order)
            assert np.array_equal(pictures, again)
            assert (info.version, len(info.weights_sha256), info.endpoints) == ("1", 64, (triton_server.address,))
            assert info.weights_sha256 == (await asking.stage.info()).weights_sha256
            for name in ("queue", "run"):
                assert asking.figure(f"reimagen_generator_triton_{name}_seconds_count") == 2
            assert asking.figure("reimagen_generator_triton_in_flight", endpoint=triton_server.address) == 0

    host.call(ask())
    assert sorted(seen) == [(p, s, s % 3 == 0) for p in range(2) for s in range(1, 7)]


def test_the_text_encoder(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> None:
        async with asked(64, triton_server.address) as asking:
            stage64 = asking.stage
            texts = TritonTexts(
                "named", [triton_server.address], policy=stage64.endpoints.policy, metrics=stage64.metrics
            )
            await texts.open(timeout_s=20.0)
            encoded = await texts.encode(["a dog", "a much longer cat on a mat"], call=Call())
            assert (texts.name, texts.width) == ("named", 384)
            assert encoded.states.shape == (2, encoded.mask.shape[1], 384)
            assert encoded.mask.sum(1).tolist()[0] < encoded.mask.sum(1).tolist()[1]
            await texts.close()

    host.call(ask())


class Steps:
    """The steps that were told, beside the passes of the network that were made meanwhile."""

    def __init__(self, server: TritonServer) -> None:
        self.told = 0
        self.begun = asyncio.Event()
        self._server = server
        self._before = 0.0

    def on_step(self, picture: int, step: int, x0: np.ndarray | None) -> None:
        self.told = step
        if step == 5:
            self.begun.set()

    async def begin(self) -> None:
        """Count from here."""
        self._before = await self._passes()

    async def extra(self) -> float:
        """Passes beyond the steps that were told."""
        return await self._passes() - self._before - self.told

    async def _passes(self) -> float:
        await asyncio.sleep(COUNTED_S)
        return await asyncio.to_thread(figure, self._server, PASSES, "unet_64")


@pytest.mark.parametrize("how", ["task", "call"])
def test_cancelling_stops_the_network_within_a_step(host: Host, triton_server: TritonServer, how: str) -> None:
    async def ask() -> float:
        gone, steps = threading.Event(), Steps(triton_server)
        async with asked(64, triton_server.address) as asking:
            await steps.begin()
            call = Call(is_cancelled=gone.is_set)
            order = plans(64, 7, STEP_LIMIT, SEVERAL), text_inputs(3, 2)
            drawing = asyncio.create_task(asking.draw(*order, on_step=steps.on_step, call=call))
            await steps.begun.wait()
            drawing.cancel() if how == "task" else gone.set()
            with pytest.raises(asyncio.CancelledError):
                await drawing
            return await steps.extra()

    assert host.call(ask()) <= 2, "the step under way, and perhaps the one that began while Triton was told"
    until = time.monotonic() + 5
    while figure(triton_server, LIVE, "unet_64"):
        assert time.monotonic() < until, "its state is kept"
        time.sleep(0.1)


def test_requests_that_are_left_or_fail_harm_no_other(host: Host, triton_server: TritonServer) -> None:
    """Calls that are cancelled, and errors with a status, end this Triton within some dozens of them."""
    good = pack_request(StageRequest(plans=plans(64, 7, 40), inputs=text_inputs(3, 2)))
    bad = {name: tensor for name, tensor in good.items() if name != "text"}
    nothing = pack_request(StageRequest(plans=(), inputs=None))

    async def leave(client: TritonClient, number: int) -> None:
        seen = 0
        async with aclosing(client.stream("unet_64", good, timeout_s=30.0, farewell=nothing)) as answers:
            async for _ in answers:
                seen += 1
                if seen > number % 4:
                    break

    async def fail(client: TritonClient) -> None:
        async with aclosing(client.stream("unet_64", bad, timeout_s=30.0)) as answers:
            with pytest.raises(InvalidArgument):
                await anext(answers)

    async def ask() -> None:
        client = TritonClient(triton_server.address)
        for number in range(30):
            await asyncio.gather(*(leave(client, number + i) for i in range(6)), *(fail(client) for _ in range(4)))
        async with asked(64, triton_server.address) as asking:
            await asking.draw(plans(64, 7, 3), text_inputs(3, 2))
        await client.close()

    before = triton_server.log.read_text().count("HandleCancellation")
    host.call(ask(), timeout_s=120.0)
    assert triton_server.log.read_text().count("HandleCancellation") == before
    until = time.monotonic() + 5
    while figure(triton_server, LIVE, "unet_64"):
        assert time.monotonic() < until, "state is kept"
        time.sleep(0.1)


def test_a_deadline_ends_the_work_there_too(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> float:
        steps = Steps(triton_server)
        async with asked(64, triton_server.address) as asking:
            await steps.begin()
            until = time.monotonic() + 0.5
            call = Call(time_remaining_s=lambda: until - time.monotonic())
            order = plans(64, 7, STEP_LIMIT, SEVERAL), text_inputs(3, 2)
            with pytest.raises(DeadlineExceeded):
                await asking.draw(*order, on_step=steps.on_step, call=call)
            late_s = time.monotonic() - until
            assert await steps.extra() <= 2
            assert asking.figure("reimagen_generator_triton_retries_total") == 0
            return late_s

    assert host.call(ask()) < 1.0


def test_no_room_is_said_before_any_work(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> None:
        async with asked(64, triton_server.address) as asking:
            many = plans(64, 7, 1, num_pictures=12_000)
            with pytest.raises(ResourceExhausted, match="stage 64: 12000 pictures need") as refused:
                await asking.draw(many, text_inputs(3, 2))
            assert refused.value.retry_after_s is None, "it would not fit an idle Triton"

    host.call(ask())


def test_every_stage_is_a_model_by_its_name(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> list[int]:
        said = []
        for size in (64, 256, 1024):
            async with asked(size, triton_server.address) as asking:
                info = await asking.stage.info()
                assert info.unet.scale == stage(size).scale
                assert info.parameters > 1000
                said.append(info.stage)
        return said

    assert host.call(ask()) == [64, 256, 1024]
