"""Which Triton is asked, which is not, and how often: before a real one, through relays that fail."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from common.service.config import ConfigError
from common.service.errors import DeadlineExceeded, Unavailable
from common.service.health import Health
from common.service.server import serve
from deploy.local.tritonserver import TritonServer
from generator_svc.__main__ import GeneratorSettings, opened
from generator_svc.call import Call
from generator_svc.triton_addresses import resolved
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_errors import EndpointFailed
from generator_svc.triton_retries import MAX_ATTEMPTS, RetryBudget, with_retries
from tests.generator_svc.relay import Relay
from tests.generator_svc.served import Asked, asked
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import Host

EJECTED_S, TAKEN_IN_S = 5.0, 10.0
LONG = 300  # steps: about a second
ORDER = plans(64, 7, LONG), text_inputs(3, 2)
SHORT = plans(64, 7, 2), text_inputs(3, 2)
RETRIES, ATTEMPTS = "reimagen_generator_triton_retries_total", "reimagen_generator_triton_attempts_total"
ERRORS = "reimagen_generator_triton_errors_total"
EJECTIONS = "reimagen_generator_triton_ejections_total"


@asynccontextmanager
async def relays(server: TritonServer, count: int) -> AsyncIterator[list[Relay]]:
    opened = [Relay(server.address) for _ in range(count)]
    for relay in opened:
        await relay.open()
    try:
        yield opened
    finally:
        for relay in opened:
            await relay.cut()


def at_step(step: int, begun: asyncio.Event) -> dict[str, object]:
    def on_step(picture: int, done: int, x0: np.ndarray | None) -> None:
        if done == step:
            begun.set()

    return {"on_step": on_step}


def where(asking: Asked) -> str:
    """The address of the one endpoint with a request."""
    (busy,) = [each for each in asking.stage.endpoints.in_use if each.in_flight]
    return busy.address


def test_addresses_of_a_name(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for itself in ("127.0.0.1:8001", "[::1]:8001", "unix:/run/triton.sock"):
        assert host.call(resolved(itself)) == {itself: ""}
    answers = [(0, 0, 0, "", ("10.0.0.1", 8001)), (0, 0, 0, "", ("10.0.0.2", 8001)), (0, 0, 0, "", ("::1", 8001, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    found = ("10.0.0.1:8001", "10.0.0.2:8001", "[::1]:8001")
    assert host.call(resolved("triton:8001")) == dict.fromkeys(found, "triton")


def test_a_name_gains_and_loses_an_address(
    host: Host, triton_server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(triton_server.address.rpartition(":")[2])
    known = ["127.0.0.1", "127.0.0.2"]  # nobody listens at the second
    real = socket.getaddrinfo

    def imitated(name: str, *rest: object, **more: object) -> object:
        return [(0, 0, 0, "", (ip, port)) for ip in known] if name == "triton" else real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", imitated)

    async def ask() -> None:
        policy = EndpointPolicy(resolve_interval_s=0.2)
        async with asked(64, f"triton:{port}", policy=policy) as asking:
            series = {"target": f"unet_64@127.0.0.2:{port}"}
            for _ in range(10):
                await asking.draw(*SHORT)
            assert asking.in_use == {f"127.0.0.1:{port}"}
            assert asking.figure(RETRIES) == 0, "an address that no canary has passed is not asked"
            assert asking.registry.get_sample_value("reimagen_canary_success", series) == 0
            known.remove("127.0.0.2")
            await asyncio.sleep(0.5)
            assert asking.registry.get_sample_value("reimagen_canary_success", series) is None, "no series for ever"
            known[:] = []
            monkeypatch.setattr(socket, "getaddrinfo", partial(_no_such_name))
            await asyncio.sleep(0.5)
            await asking.draw(*SHORT)  # an answer that does not come is no answer

    host.call(ask())


def _no_such_name(*_: object, **__: object) -> object:
    raise socket.gaierror(socket.EAI_AGAIN, "no name server")


def test_the_endpoint_with_the_least_requests_is_asked(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> Counter[str]:
        async with relays(triton_server, 3) as three, AsyncExitStack() as held:
            asking = await held.enter_async_context(asked(64, *(r.address for r in three), wait_for=3))
            leases = [asking.stage.endpoints.lease(deadline=None) for _ in range(9)]
            return Counter([(await held.enter_async_context(lease)).address for lease in leases])

    shares = host.call(ask())
    assert sorted(shares.values()) == [3, 3, 3]


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_a_stage_that_loses_its_endpoint_ends_at_another_with_the_same_bytes(
    host: Host, triton_server: TritonServer, how: str
) -> None:
    async def ask() -> None:
        async with relays(triton_server, 2) as both, asked(64, *(r.address for r in both), wait_for=2) as asking:
            wanted, _ = await asking.draw(*ORDER)
            begun, steps = asyncio.Event(), []

            def on_step(picture: int, step: int, x0: np.ndarray | None) -> None:
                steps.append(step)
                if step == LONG // 4:
                    begun.set()

            drawing = asyncio.create_task(asking.draw(*ORDER, on_step=on_step))
            await begun.wait()
            lost = next(relay for relay in both if relay.address == where(asking))
            asking.changed.clear()
            if how == "cut":
                await lost.cut()
            else:
                lost.freeze()
            await asking.until(lambda: lost.address not in asking.in_use, EJECTED_S)
            assert np.array_equal((await drawing)[0], wanted)
            assert steps == list(range(1, LONG + 1)), "no step is told twice"
            assert asking.figure(RETRIES) == 1
            assert asking.figure(EJECTIONS, endpoint=lost.address) == 1
            kind = {"cut": "unreachable", "freeze": "hung"}[how]
            assert asking.figure(ERRORS, kind=kind) == 1
            for _ in range(4):
                await asking.draw(*SHORT)
            assert asking.figure(RETRIES) == 1, "what is ejected is not asked"
            if how == "cut":
                await lost.open()
            else:
                lost.thaw()
            await asking.until(lambda: lost.address in asking.in_use, TAKEN_IN_S)

    host.call(ask())


def test_an_idle_endpoint_is_found_out_by_its_canary(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> None:
        async with relays(triton_server, 1) as (relay,), asked(64, relay.address) as asking:
            for strike, heal in ((relay.freeze, relay.thaw), (relay.cut, relay.open)):
                asking.changed.clear()
                if (work := strike()) is not None:
                    await work
                await asking.until(lambda: not asking.in_use, EJECTED_S)
                with pytest.raises(Unavailable) as refused:
                    await asking.draw(*SHORT)
                assert refused.value.retry_after_s
                with pytest.raises(Unavailable):
                    await asking.stage.info()
                if (work := heal()) is not None:
                    await work
                await asking.until(lambda: bool(asking.in_use), TAKEN_IN_S)
                await asking.draw(*SHORT)

    host.call(ask())


@pytest.mark.parametrize(("stall_s", "is_ejected"), [(30.0, False), (0.0, True)])
def test_a_long_step_is_no_silence_while_triton_answers(
    host: Host, triton_server: TritonServer, stall_s: float, is_ejected: bool
) -> None:
    async def ask() -> None:
        policy = EndpointPolicy(canary_interval_s=0.1, canary_timeout_s=0.5, answer_s=0.5, stall_s=stall_s)
        async with asked(64, triton_server.address, policy=policy) as asking:
            until = time.monotonic() + 3.0
            call = Call(time_remaining_s=lambda: until - time.monotonic())
            many = plans(64, 7, 1, num_pictures=4000), text_inputs(3, 0)  # their one step takes longer than that
            with pytest.raises(DeadlineExceeded):
                await asking.draw(*many, call=call)
            assert bool(asking.figure(EJECTIONS, endpoint=triton_server.address)) == is_ejected
            await asking.until(lambda: bool(asking.in_use), TAKEN_IN_S)

    host.call(ask())


@pytest.mark.parametrize(("passes", "is_ejected"), [(0, True), (1_000_000, False)])
def test_a_model_is_waited_for_as_long_as_its_passes_take(
    host: Host, triton_server: TritonServer, monkeypatch: pytest.MonkeyPatch, passes: int, is_ejected: bool
) -> None:
    monkeypatch.setattr("generator_svc.triton_stage.PATIENCE_PASSES", passes)
    monkeypatch.setattr("generator_svc.triton_stage.PATIENCE_S", 0.0)

    async def ask() -> None:
        policy = EndpointPolicy(canary_interval_s=0.1, canary_timeout_s=0.5, answer_s=0.5, silence_s=0.5)
        address = triton_server.address
        async with asked(64, address) as drawing, asked(64, address, policy=policy) as idle:
            until = time.monotonic() + 3.0
            call = Call(time_remaining_s=lambda: until - time.monotonic())
            with pytest.raises(DeadlineExceeded):
                await drawing.draw(plans(64, 7, 1, num_pictures=4000), text_inputs(3, 0), call=call)
            assert bool(idle.figure(EJECTIONS, endpoint=address)) == is_ejected
            await idle.until(lambda: bool(idle.in_use), TAKEN_IN_S)

    host.call(ask())


def test_a_stage_waits_for_its_only_endpoint_to_come_back(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> None:
        async with relays(triton_server, 1) as (relay,), asked(64, relay.address) as asking:
            wanted, _ = await asking.draw(*ORDER)
            begun = asyncio.Event()
            drawing = asyncio.create_task(asking.draw(*ORDER, **at_step(20, begun)))
            await begun.wait()
            await relay.cut()
            await asyncio.sleep(1.0)
            await relay.open()
            assert np.array_equal((await drawing)[0], wanted)

    host.call(ask())


def test_a_stage_waits_no_longer_than_its_deadline(host: Host, triton_server: TritonServer) -> None:
    async def ask() -> tuple[float, Exception]:
        policy = EndpointPolicy(patience_s=0.5)
        async with relays(triton_server, 1) as (relay,), asked(64, relay.address, policy=policy) as asking:
            begun = asyncio.Event()
            until = time.monotonic() + 1.5
            call = Call(time_remaining_s=lambda: until - time.monotonic())
            drawing = asyncio.create_task(asking.draw(*ORDER, call=call, **at_step(5, begun)))
            await begun.wait()
            await relay.cut()
            with pytest.raises(DeadlineExceeded):
                await drawing
            late_s = time.monotonic() - until
            await relay.open()
            await asking.until(lambda: bool(asking.in_use), TAKEN_IN_S)
            begun.clear()
            drawing = asyncio.create_task(asking.draw(*ORDER, call=Call(), **at_step(5, begun)))
            await begun.wait()
            await relay.cut()
            with pytest.raises(Unavailable) as gave_up:
                await drawing
            return late_s, gave_up.value

    late_s, gave_up = host.call(ask())
    assert late_s < 1.0
    assert "no Triton serves unet_64" in str(gave_up)


def test_a_budget_lets_a_third_fail_and_stops_when_all_do() -> None:
    budget = RetryBudget()
    for attempt in range(1000):
        (budget.fail if attempt % 10 < 3 else budget.succeed)()
        assert budget.allows
    retries = 0
    for _ in range(100):
        budget.fail()
        while budget.allows:
            budget.fail()
            retries += 1
    assert retries <= 20


@pytest.mark.parametrize(
    ("kind", "is_down", "attempts"),
    [("other", False, MAX_ATTEMPTS), ("stub_dead", True, 3), ("raised", False, 2), ("stopping", True, MAX_ATTEMPTS)],
)
def test_a_request_that_fails_everywhere_is_given_up(
    host: Host, triton_server: TritonServer, kind: str, is_down: bool, attempts: int
) -> None:
    async def ask() -> None:
        async with asked(64, triton_server.address) as asking:

            async def attempt(endpoint: object, timeout_s: float | None) -> None:
                raise EndpointFailed("wrong", kind=kind, is_down=is_down)  # type: ignore[arg-type]

            given = {"budget": RetryBudget(), "metrics": asking.stage.metrics, "call": Call()}
            assert asking.registry.get_sample_value(ERRORS, {"model": "unet_64", "kind": "stub_dead"}) == 0.0
            with pytest.raises(EndpointFailed):
                await with_retries(asking.stage.endpoints, attempt, **given)
            assert asking.figure(ATTEMPTS) == attempts
            assert asking.figure(ERRORS, kind=kind) == attempts

    host.call(ask())


def test_readiness_follows_the_tritons_and_liveness_does_not(
    host: Host, triton_server: TritonServer, tmp_path: Path
) -> None:
    async def ask() -> None:
        async with relays(triton_server, 1) as (relay,):
            settings = GeneratorSettings(
                address=f"unix:{tmp_path}/g.sock",
                stages="triton",
                triton_addresses=relay.address,
                retrieval_address=f"unix:{tmp_path}/none.sock",
                without_retrieval="draw",  # so that readiness asks for the Tritons alone
                grace_s=0.5,
            )
            settings.check()
            health, stop, ready = Health(), asyncio.Event(), asyncio.Event()
            registry = CollectorRegistry()
            serving = asyncio.create_task(
                serve(
                    settings,
                    opened=partial(opened, settings, registry, health=health),
                    registry=registry,
                    health=health,
                    announce=lambda address: ready.set(),
                    stop=stop,
                )
            )
            async with grpc.aio.insecure_channel(settings.address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)

                async def until(serving: bool, timeout_s: float) -> float:
                    started = time.monotonic()
                    while (await says("readiness")) != serving:
                        assert time.monotonic() - started < timeout_s
                        await asyncio.sleep(0.05)
                    assert await says("") == serving
                    assert await says("reimagen.generator.v1.GeneratorService") == serving
                    assert await says("liveness")
                    return time.monotonic() - started

                async def says(name: str) -> bool:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), wait_for_ready=True)
                    return answer.status == health_pb2.HealthCheckResponse.SERVING

                await ready.wait()
                await until(True, TAKEN_IN_S)
                for strike, heal in ((relay.freeze, relay.thaw), (relay.cut, relay.open)):
                    if (work := strike()) is not None:
                        await work
                    await until(False, EJECTED_S)
                    if (work := heal()) is not None:
                        await work
                    await until(True, TAKEN_IN_S)
            stop.set()
            await serving

    host.call(ask())


def test_addresses_that_cannot_be() -> None:
    given = {"stages": "triton", "retrieval_address": "unix:/r.sock"}
    for wrong in ("triton", "triton:grpc", "a:1,b"):
        with pytest.raises(ConfigError, match="--triton-addresses"):
            GeneratorSettings(**given, triton_addresses=wrong).check()
    with pytest.raises(ConfigError, match="--triton-addresses: missing"):
        GeneratorSettings(**given).check()
    assert GeneratorSettings(**given, triton_addresses="a:1, b:2,").tritons() == ("a:1", "b:2")
