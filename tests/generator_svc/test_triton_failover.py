"""Tritons and their stubs that are killed in the middle of a stage: the same picture all the same.

REIMAGEN_FAULTS says how often (`make test-faults`: 50); a few of them are part of the suite. A stage that is drawn again
is drawn in the same batch of one, so its bytes are the same; in another batch they may differ by rounding.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from deploy.local.tritonserver import TritonServer, TritonSettings
from generator_svc.stage_inputs import StageInputs
from generator_svc.stage_tensors import ModelCard
from generator_svc.triton_endpoint import Endpoint
from tests.generator_svc.served import Asked, asked
from tests.generator_svc.test_triton_conformance import picture_inputs, plans, text_inputs
from tests.generator_svc.tiny_stack import Host

FAULTS = int(os.environ.get("REIMAGEN_FAULTS", "3"))
SIZES = (64, 256, 1024) if FAULTS > 9 else (64,)  # each stage is an interpreter more that every restart has to start
STEPS = {64: 400, 256: 150, 1024: 20}
RECOVERED_S = 10.0
EJECTED_S = 5.0


def inputs(size: int) -> StageInputs:
    if size == 64:
        return text_inputs(3, 2)
    low_res = np.random.default_rng(size).uniform(-1, 1, (1, 3, size // 4, size // 4)).astype(np.float32)
    neighbors = np.zeros((0, size, size, 3), np.uint8)
    return StageInputs(**{**vars(picture_inputs(1, 1)), "low_res": low_res, "neighbors": neighbors})


class Victim:
    """A Triton that is killed, and started again at its address."""

    def __init__(self, repository: Path, log: Path) -> None:
        self._settings = {"repository": repository, "log": log, "models": tuple(f"unet_{size}" for size in SIZES)}
        self.server = TritonServer(TritonSettings(**self._settings, drain_s=2))
        self.server.wait_ready()
        self.address = self.server.address

    def strike(self, fault: str, size: int) -> None:
        """Do it harm in a way from which it does not recover alone."""
        if fault == "stub":
            os.kill(self.stub(size), signal.SIGKILL)
        elif fault == "server":
            os.kill(self.server.pid, signal.SIGKILL)
        else:
            self.server.terminate()

    def stub(self, size: int) -> int:
        """The process that runs a stage."""
        named = f"/unet_{size}/".encode()
        (pid,) = [p for p in self.server.stubs() if named in Path(f"/proc/{p}/cmdline").read_bytes()]
        return pid

    def restart(self) -> None:
        """What a supervisor does that is told by a canary."""
        if self.server.stubs():
            os.kill(self.server.pid, signal.SIGKILL)  # asked to end, a server whose stub is gone takes its time
        self.server.stop()
        port = int(self.address.rpartition(":")[2])
        self.server = TritonServer(TritonSettings(**self._settings, drain_s=2, grpc_port=port))
        self.server.wait_ready()


@pytest.fixture(scope="module")
def victim(triton_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    opened = Victim(triton_repository, tmp_path_factory.mktemp("victim") / "tritonserver.log")
    yield opened
    opened.server.stop()


async def struck(asking: Asked, victim: Victim, fault: str, size: int, step: int) -> asyncio.Task[np.ndarray]:
    """A drawing at the victim, which has been hit when `step` steps were done."""
    begun = asyncio.Event()

    def on_step(picture: int, done: int, x0: np.ndarray | None) -> None:
        if done == step:
            begun.set()

    async def draw() -> np.ndarray:
        return (await asking.draw(plans(size, 7, STEPS[size]), inputs(size), on_step=on_step))[0]

    async with AsyncExitStack() as held:
        for other in asking.stage.endpoints.in_use:
            if other.address != victim.address:  # busy, so that the victim is asked
                other.in_flight += 1
                held.callback(_free, other)
        drawing = asyncio.create_task(draw())
        await begun.wait()
    victim.strike(fault, size)
    return drawing


def _free(endpoint: Endpoint[ModelCard]) -> None:
    endpoint.in_flight -= 1


def test_killed_in_the_middle_of_a_stage(host: Host, triton_server: TritonServer, victim: Victim) -> None:
    """By turns another Triton takes over, or the killed one when it has been started again."""
    chance = random.Random(FAULTS)

    async def ask(number: int) -> None:
        size, fault = SIZES[number % len(SIZES)], ("stub", "server", "term")[number // len(SIZES) % 3]
        step, alone = chance.randrange(1, STEPS[size] // 2), number % 2 == 1
        said = f"{fault}, at step {step} of unet_{size}, {'alone' if alone else 'beside another'}"
        async with asked(size, triton_server.address) as reference:
            wanted, _ = await reference.draw(plans(size, 7, STEPS[size]), inputs(size))
        addresses = (victim.address,) if alone else (victim.address, triton_server.address)
        async with asked(size, *addresses, wait_for=len(addresses)) as asking:
            drawing = await struck(asking, victim, fault, size, step)
            hit = time.monotonic()
            if alone:
                await asyncio.to_thread(victim.restart)
            drawn = await drawing
            assert np.array_equal(drawn, wanted), said
            print(f"\n{said}: drawn {time.monotonic() - hit:.2f} s after the fault")
            if not alone:
                await asyncio.to_thread(victim.restart)
            await asking.until(lambda: victim.address in asking.in_use, RECOVERED_S)

    for number in range(FAULTS):
        host.call(ask(number), timeout_s=180.0)


def test_a_dead_stub_is_found_out_though_triton_says_ready(host: Host, victim: Victim) -> None:
    async def ask() -> None:
        async with asked(64, victim.address) as asking:
            asking.changed.clear()
            victim.strike("stub", 64)
            ejected_s = await asking.until(lambda: not asking.in_use, EJECTED_S)
            victim.server.wait_ready(timeout_s=5.0)  # so it says
            await asyncio.to_thread(victim.restart)
            restarted_s = await asking.until(lambda: bool(asking.in_use), RECOVERED_S)
            print(f"\nejected after {ejected_s:.2f} s, in use {restarted_s:.2f} s after the restart")
            await asking.draw(plans(64, 7, 2), inputs(64))

    host.call(ask(), timeout_s=180.0)


def test_a_stub_that_stands_still_is_found_out(host: Host, victim: Victim) -> None:
    """Neither its process nor its connection ends. Triton may take it for dead, or go on saying that it is ready."""

    async def ask() -> None:
        async with asked(64, victim.address) as asking:
            wanted, _ = await asking.draw(plans(64, 7, STEPS[64]), inputs(64))
            begun = asyncio.Event()
            drawing = asyncio.create_task(
                asking.draw(plans(64, 7, STEPS[64]), inputs(64), on_step=lambda picture, step, x0: begun.set())
            )
            await begun.wait()
            os.kill(victim.stub(64), signal.SIGSTOP)
            ejected_s = await asking.until(lambda: not asking.in_use, EJECTED_S)
            await asyncio.to_thread(victim.restart)
            assert np.array_equal((await drawing)[0], wanted)
            print(f"\nejected after {ejected_s:.2f} s")

    host.call(ask(), timeout_s=180.0)
