"""The benchmark of generation: what runs without Triton runs, and what it measures against draws the same pictures."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from bench import serving
from bench.serving_overload import overloaded
from bench.serving_service import Outcome, generator
from bench.serving_stage import StageOrder, make_orders
from bench.serving_steps import StepClient
from common.checkpoint import load_stage
from common.stages import STAGES
from generator_svc.stage_engine import StageEngine
from tests.generator_svc.tiny_stack import write_weights


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> serving.Bench:
    """Tiny weights, and as little of everything as can be."""
    weights = write_weights(tmp_path_factory.mktemp("weights"))
    return serving.Bench(weights=weights, repeats=1, orders=4, seconds=1.0, threads=1)


def test_a_small_run_measures_everything(bench: serving.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "serving.json"
    flags = ["--parts", "network", "embedded", "--repeats", "1", "--orders", "4", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, "--weights", str(bench.weights), "--out", str(out)])
    assert serving.main() == 0
    figures: dict[str, Any] = json.loads(out.read_text())
    # A difference of two times, each taken once or twice: beside other work it may be anything.
    shares = figures["neighbor_share"], figures["network"]["unet_64"]["neighbor_share_together"]
    assert all(isinstance(share, float) for share in shares)
    assert figures["interleaved_vs_joint"] > 0
    assert 0 < figures["convolution_rate_share"] < 1.5
    assert list(figures["embedded"]["callers"]) == ["1", "2", "4", "8", "16"]
    assert figures["embedded"]["callers"]["1"] == figures["embedded"]["callers"]["1"] | {
        "mean_batch": 1.0,
        "vs_serial": 1.0,
    }
    assert figures["mean_batch_at_8"] > 1
    for step in figures["network"]["unet_64"]["steps_of"].values():
        assert sum(step["where_time_goes"].values()) == pytest.approx(1.0, abs=0.01)
    assert "| neighbor_share |" in out.with_suffix(".md").read_text()


def test_a_step_a_call_draws_the_same_pictures(bench: serving.Bench, tmp_path: Path) -> None:
    spec = STAGES[0]
    orders = make_orders(spec, 3)
    engine = StageEngine(spec, load_stage(bench.weights, spec.size).unet, max_batch=8, max_live_bytes=1 << 30)

    def alone(order: StageOrder) -> np.ndarray:
        job = engine.begin([order.plan], order.inputs)
        while job.pictures is None:
            engine.advance([job])
        return job.pictures[0]

    async def drawn(address: str) -> list[list[np.ndarray]]:
        async with grpc.aio.insecure_channel(address) as channel:
            client = StepClient(channel)
            return [await asyncio.gather(*map(draw, orders)) for draw in (client.draw, client.draw_sticky)]

    with serving._steps(bench, tmp_path) as address:
        for pictures in asyncio.run(drawn(address)):
            for order, picture in zip(orders, pictures, strict=True):
                assert np.abs(picture.clip(-1, 1) - alone(order)).max() < 1e-4


def test_overload_is_measured_on_a_running_service(bench: serving.Bench, tmp_path: Path) -> None:
    with generator(tmp_path, f"--weights={bench.weights}", "--threads=1", "--slots=2") as served:
        figures = overloaded(served, stop_at=64, callers=2, seconds=3.0)
    assert figures["peak_per_s"] > 0 and figures["goodput_per_s"] > 0
    assert set(figures["ended"]) <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert figures["overload_per_s"] > 4 * figures["peak_per_s"]
    assert 0 < figures["decided_p50_ms"] <= figures["decided_p99_ms"]
    assert sum(figures["refused_by_reason"].values()) > 0 and figures["begun_in_vain"] >= 0
    assert 0 < figures["cores_under_overload"]["generator"] < figures["cores_under_overload"]["of"]
    assert Outcome(code="OK", seconds=1.0).response_bytes == 0
