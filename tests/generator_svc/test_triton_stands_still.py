"""A model that stands still, whatever its passes take, is found out within seconds; one that is slow is left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.generator import GenerationRequest, GeneratorClient, StageOverrides, StepDone
from deploy.local.children import ROOT
from deploy.local.tritonserver import TritonServer, TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from tests.generator_svc.served import asked
from tests.generator_svc.test_load import Caller
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import Host, Service, generator_service
from tests.generator_svc.triton_server import wait_until

NOT_SERVING_S = 5.0
PASS_S = 6.0
SLOW = f"""
import time
from generator_svc.stage_engine import StageEngine

_step = StageEngine._step

def _slow_step(self, batch):
    time.sleep({PASS_S} if len(batch) == 3 and batch[0][2].step == 1 else 0.0)
    _step(self, batch)

StageEngine._step = _slow_step
"""
REQUEST = GenerationRequest(
    prompt="a red apple, noto style",
    seed=3,
    without_neighbors=True,
    stages=tuple(StageOverrides(stage=size, steps=steps) for size, steps in ((64, 2), (256, 2), (1024, 200))),
)


@pytest.fixture(scope="module")
def repository(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The slowest stage as it is packaged, and tiny ones; the first is slow in the second step of three pictures."""
    folder = tmp_path_factory.mktemp("still")
    tiny = ExportSettings(
        weights=weights, repository=folder, threads=1, batches="1", models="text_encoder,unet_64,unet_256"
    )
    export(tiny)
    export(replace(tiny, weights=ROOT / "weights", models="unet_1024"))
    (model,) = (folder / "unet_64").rglob("model.py")
    model.write_text(model.read_text() + SLOW)
    return folder


@contextmanager
def served(repository: Path, folder: Path) -> Iterator[tuple[TritonServer, Service]]:
    """A Triton, and a generator that asks it and no retrieval."""
    nobody = f"unix:{folder}/none.sock"
    with running_triton(TritonSettings(repository=repository, log=folder / "triton.log")) as server:
        given = {"stages": "triton", "triton_addresses": server.address, "retrieval_address": nobody}
        yield server, generator_service(folder / "g.sock", without_retrieval="draw", **given)


def stub_of(server: TritonServer, model: str) -> int:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in server.stubs()}
    (pid,) = [pid for pid, command in commands.items() if f"/{model}/" in command]
    return pid


@pytest.mark.parametrize("is_drawing", [False, True])
def test_a_stopped_stub_of_the_slowest_stage_is_told_by_health(
    host: Host, repository: Path, tmp_path: Path, is_drawing: bool
) -> None:
    with (
        served(repository, tmp_path) as (server, service),
        host.running(service) as address,
        grpc.insecure_channel(address) as channel,
        GeneratorClient(address) as client,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        def is_serving() -> bool:
            asked_of = health_pb2.HealthCheckRequest(service="readiness")  # pyright: ignore[reportAttributeAccessIssue]
            return bool(health.Check(asked_of).status == health_pb2.HealthCheckResponse.SERVING)

        wait_until(is_serving)
        callers = [Caller(client, replace(REQUEST, seed=seed)) for seed in range(3 * is_drawing)]
        for caller in callers:
            caller.until(StepDone, stage=1024)
        os.kill(stub_of(server, "unet_1024"), signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: not is_serving())
        took_s = time.monotonic() - stopped
        print(f"\nNOT_SERVING after {took_s:.2f} s")
        assert took_s < NOT_SERVING_S
        assert all(caller.error is None for caller in callers), "they wait for another, or for its return"


def test_a_slow_step_is_no_standing_still(host: Host, repository: Path, tmp_path: Path) -> None:
    """For whoever has asked for it, and for whoever's canaries stand behind it."""
    settings = TritonSettings(repository=repository, log=tmp_path / "triton.log", models=("unet_64",))

    async def ask(address: str) -> None:
        async with asked(64, address) as drawing, asked(64, address) as idle:
            started = time.monotonic()
            await drawing.draw(plans(64, 7, 2, num_pictures=3), text_inputs(3, 2))
            assert time.monotonic() - started > PASS_S
            for each in (drawing, idle):
                assert each.figure("reimagen_generator_triton_ejections_total", endpoint=address) == 0
                assert each.in_use == {address}

    with running_triton(settings) as server:
        host.call(ask(server.address), timeout_s=120.0)
