"""How a request's life in a served stage ends, on a real tritonserver: in each case its state is freed, others go on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.service.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from deploy.local.tritonserver import TritonServer, TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from generator_svc.stage_tensors import StageRequest, pack_request
from tests.generator_svc.test_triton_conformance import ORDERS, plans, text_inputs
from tests.generator_svc.triton_server import figure, stream, wait_until

MODEL = "unet_64"


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A tritonserver with room for twice `ORDERS`, however slow it is, that forgets idle ones soon."""
    folder = tmp_path_factory.mktemp("faults")
    whole = folder / "whole"
    export(
        ExportSettings(weights=weights, repository=whole, threads=1, batches="1", max_live_bytes=9 << 20, idle_s=2.0)
    )
    shutil.copytree(whole / MODEL, folder / "repository" / MODEL)
    with running_triton(TritonSettings(repository=folder / "repository", log=folder / "triton.log")) as running:
        yield running


def live(server: TritonServer) -> tuple[float, float]:
    return figure(server, "reimagen_stage_live_requests", MODEL), figure(server, "reimagen_stage_live_bytes", MODEL)


def long_request(seed: int = 1, steps: int = 1000, **changes: Any) -> StageRequest:
    return StageRequest(plans=plans(64, seed, steps, **changes), inputs=text_inputs(seed, 2))


def test_a_cancelled_request_stops_and_its_state_is_freed(server: TritonServer) -> None:
    with stream(server) as other:
        with stream(server) as opened:
            opened.send(MODEL, long_request(), name="a")
            assert opened.receive()[1].steps == (1,)
            wait_until(lambda: live(server)[0] == 1 and live(server)[1] > 0)
        wait_until(lambda: live(server) == (0, 0))
        steps = figure(server, "reimagen_stage_trajectory_steps_total", MODEL)
        assert steps < 1000
        time.sleep(0.6)
        assert figure(server, "reimagen_stage_trajectory_steps_total", MODEL) == steps
        other.send(MODEL, long_request(steps=2), name="b")
        assert len(other.finish({"b"})["b"]) == 2


def test_a_cancelled_request_leaves_its_batch(server: TritonServer) -> None:
    with stream(server) as other:
        other.send(MODEL, long_request(2, 300), name="b")
        with stream(server) as opened:
            opened.send(MODEL, long_request(), name="a")
            opened.receive()
        other.finish({"b"})
    wait_until(lambda: live(server) == (0, 0))


def test_a_deadline_ends_a_request_with_its_state(server: TritonServer) -> None:
    with stream(server) as opened:
        opened.send(MODEL, long_request(), name="a", timeout=300_000)
        with pytest.raises(DeadlineExceeded, match="stage 64"):
            opened.finish({"a"})
        wait_until(lambda: live(server) == (0, 0))


def test_what_lives_is_bounded(server: TritonServer) -> None:
    with stream(server) as opened, stream(server) as other:
        opened.send(MODEL, long_request(), name="a")
        opened.receive()
        other.send(MODEL, StageRequest(plans=plans(64, 1, 2, 100), inputs=text_inputs(1, 2)), name="b")
        with pytest.raises(ResourceExhausted, match=r"100 pictures need .* the limit is 9 MiB") as refused:
            other.receive()
        assert refused.value.retry_after_s
        other.send(MODEL, long_request(steps=2), name="c")
        assert len(other.finish({"c"})["c"]) == 2


WRONG: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "plans": lambda t: t.update(plans=np.frombuffer(b"[{}", np.uint8)[None]),
    "plans[0]": lambda t: t.update(plans=np.frombuffer(b'[{"stage": 64}]', np.uint8)[None]),
    "plans[0].stage": lambda t: t.update(
        plans=pack_request(StageRequest(plans=plans(256, 1, 2), inputs=None))["plans"]
    ),
    "text": lambda t: t.update(text=t["text"][:, :, :7].copy()),
    "text_mask": lambda t: t.pop("text_mask"),
    "neighbors": lambda t: t.update(neighbors=t["neighbors"][:, :1].copy(), text=t["text"] * np.float32("nan")),
    "neighbor_text": lambda t: t.update(neighbor_text=t["neighbor_text"][:, :1].copy()),
    "negative_text": lambda t: t.update(negative_text=t["text"].copy()),
    "preview_every": lambda t: t.update(preview_every=np.array([[-1]], np.int32)),
    "start": lambda t: t.update(plans=pack_request(long_request(steps=2, start_time=0.5))["plans"]),
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_content_ends_its_request_alone(server: TritonServer, field: str) -> None:
    tensors = pack_request(long_request(steps=2))
    WRONG[field](tensors)
    with stream(server) as opened, stream(server) as other:
        other.send(MODEL, long_request(3, 30), name="good")
        opened.send(MODEL, tensors, name="bad")
        with pytest.raises(InvalidArgument) as refused:
            opened.receive()
        named = refused.value.violations[0][0]
        assert named in (field, "text"), f"{named}: {refused.value}"
        assert len(other.finish({"good"})["good"]) == 30
    wait_until(lambda: live(server) == (0, 0))


def test_a_question_without_plans_tells_what_the_model_is(server: TritonServer) -> None:
    with stream(server) as opened:
        opened.send(MODEL, StageRequest(plans=(), inputs=None), name="a")
        card = opened.finish({"a"})["a"][-1].model
    assert card is not None and (card.stage, card.version, card.max_live_bytes) == (64, "1", 9 << 20)
    assert card.unet.text_width == 384 and len(card.sha256) == 64 and card.parameters > 1000
    assert card.trained == {"examples": 0}


def test_many_requests_come_and_go_and_nothing_is_left(server: TritonServer) -> None:
    """More than fit in one batch, of all kinds, some of them broken off."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        with stream(server) as opened, stream(server) as broken:
            wanted = set()
            for i in rng.permutation(len(ORDERS[64])):
                order, given = ORDERS[64][i]
                opened.send(MODEL, StageRequest(plans=order, inputs=given), name=str(i))
                wanted.add(str(i))
                broken.send(MODEL, long_request(int(i), 500), name="x")
            broken.cancel()
            opened.finish(wanted)
        wait_until(lambda: live(server) == (0, 0))


def test_nothing_outlives_a_killed_server(weights: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a step: the stub ends by itself, `stop` cleans shared memory."""
    export(ExportSettings(weights=weights, repository=tmp_path / "whole", threads=1, batches="1"))
    shutil.copytree(tmp_path / "whole" / MODEL, tmp_path / "repository" / MODEL)
    settings = TritonSettings(repository=tmp_path / "repository", log=tmp_path / "triton.log")
    with running_triton(settings) as running, stream(running) as opened:
        opened.send(MODEL, replace(long_request(), preview_every=1), name="a")
        opened.receive()
        stubs = running.stubs()
        assert len(stubs) == 1 and running.regions()
        os.kill(running.pid, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in stubs))
    assert not running.regions()
