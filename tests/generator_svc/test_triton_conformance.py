"""The same plans through Triton, through the runtime of this process and through a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.checkpoint import load_stage
from common.diffusion.guidance import Guidance
from common.diffusion.plan import Plan
from common.images import to_unit
from common.stages import stage
from common.trajectories import begin, noised_low_res, step_together, under_text
from common.unet.unet import UNet
from deploy.local.tritonserver import TritonServer
from generator_svc.stage_inputs import StageInputs
from generator_svc.stage_runtime import StageRuntime
from generator_svc.stage_tensors import StageRequest
from tests.generator_svc.triton_server import figure, stream, wait_until

TOLERANCE = 1e-5
TIMEOUT_S = 60.0


def text_inputs(number: int, num_neighbors: int, *, tokens: int = 6, negative: int = 0, **changes: Any) -> StageInputs:
    """Random conditions of the first stage; `negative` tokens of a negative text."""
    rng = np.random.default_rng(number)
    given = StageInputs(
        text=rng.standard_normal((tokens, 384), np.float32),
        text_mask=np.arange(tokens) < max(1, tokens - number % 2),
        neighbors=rng.integers(0, 256, (num_neighbors, 64, 64, 3), np.uint8),
        neighbor_text=rng.standard_normal((num_neighbors, tokens, 384), np.float32),
        neighbor_text_mask=np.ones((num_neighbors, tokens), np.bool_),
        low_res=None,
        negative_text=rng.standard_normal((negative, 384), np.float32) if negative else None,
        negative_text_mask=np.ones(negative, np.bool_) if negative else None,
    )
    return replace(given, **changes)


def picture_inputs(number: int, num_pictures: int) -> StageInputs:
    """Conditions of the second stage, which reads neither text nor neighbors."""
    rng = np.random.default_rng(number)
    return StageInputs(
        text=np.zeros((0, 0), np.float32),
        text_mask=np.zeros(0, np.bool_),
        neighbors=np.zeros((0, 256, 256, 3), np.uint8),
        neighbor_text=np.zeros((0, 0, 0), np.float32),
        neighbor_text_mask=np.zeros((0, 0), np.bool_),
        low_res=rng.uniform(-1, 1, (num_pictures, 3, 64, 64)).astype(np.float32),
    )


def guidance(strategy: Any, text: float, neighbors: float, eta: float) -> Guidance:
    return Guidance(strategy=strategy, text_weight=text, neighbor_weight=neighbors, eta=eta)


def plans(size: int, seed: int, steps: int, num_pictures: int = 1, **changes: Any) -> tuple[Plan, ...]:
    plan = replace(stage(size).plan(seed), steps=steps, **changes)
    return tuple(replace(plan, sample=i) for i in range(num_pictures))


START = np.random.default_rng(77).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
ORDERS: dict[int, tuple[tuple[tuple[Plan, ...], StageInputs], ...]] = {
    64: (
        (plans(64, 1, 3, guidance=guidance("interleaved", 3, 5, 0.5)), text_inputs(1, 2)),
        (
            plans(64, 2, 5, 2, sampler="dpmpp_2m", guidance=guidance("interleaved", 2, 2, 0.3)),
            text_inputs(2, 1, tokens=9),
        ),
        (plans(64, 3, 4, guidance=guidance("joint", 3, 1, 0.0)), text_inputs(3, 0)),
        (plans(64, 4, 2, sampler="ddpm", thresholding="static"), text_inputs(4, 4, tokens=3)),
        (plans(64, 5, 6, guidance=guidance("weighted", 2, 4, 0.5)), text_inputs(5, 2, negative=4)),
        (plans(64, 6, 7, thresholding="none", guidance=guidance("joint", 1, 1, 0.0)), text_inputs(6, 3, tokens=1)),
        (plans(64, 7, 4, 2, start_time=0.6), text_inputs(7, 1, start=START)),
    ),
    256: (
        (plans(256, 8, 2), picture_inputs(8, 1)),
        (plans(256, 9, 4, 2, augmentation=0.2), picture_inputs(9, 2)),
        (plans(256, 10, 3, sampler="ddpm"), picture_inputs(10, 1)),
    ),
}
CASES = [pytest.param(size, id=str(size)) for size in ORDERS]


@pytest.fixture(scope="module")
def unets(weights: Path) -> dict[int, UNet]:
    """The networks that the server holds."""
    return {size: load_stage(weights, size).unet for size in ORDERS}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is tiny is slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def plain_loop(unet: UNet, order: tuple[tuple[Plan, ...], StageInputs]) -> np.ndarray:
    """Each picture alone: no engine, no batch."""
    drawn = []
    for i, plan in enumerate(order[0]):
        given, low_res = order[1], None
        if given.low_res is not None:
            low_res = noised_low_res(plan, torch.from_numpy(given.low_res[i]))
        condition = unet.condition(
            text=torch.from_numpy(given.text)[None],
            text_mask=torch.from_numpy(given.text_mask)[None],
            neighbors=torch.from_numpy(to_unit(given.neighbors)).movedim(-1, 1)[None],
            neighbor_text=torch.from_numpy(given.neighbor_text)[None],
            neighbor_text_mask=torch.from_numpy(given.neighbor_text_mask)[None],
            neighbor_mask=torch.ones(1, len(given.neighbors), dtype=torch.bool),
            low_res=low_res[0] if low_res else None,
            augmentation=low_res[1] if low_res else None,
        )
        negative = None
        if given.negative_text is not None and given.negative_text_mask is not None:
            text, mask = torch.from_numpy(given.negative_text), torch.from_numpy(given.negative_text_mask)
            negative = under_text(unet, condition, text[None], mask[None])
        start = given.start[i % len(given.start)] if given.start is not None else None
        trajectory = begin(plan, condition, negative=negative, start=start)
        while not trajectory.done:
            step_together(unet, stage(plan.stage).prediction, [trajectory])
        drawn.append(trajectory.x_t.clamp(-1, 1).numpy())
    return np.stack(drawn)


def in_process(unet: UNet, size: int) -> list[np.ndarray]:
    """All orders at once through the runtime."""
    runtime = StageRuntime(stage(size), unet, max_batch=4, max_live_bytes=1 << 28)
    with ExitStack() as held:
        held.callback(runtime.close)
        futures: list[Future[np.ndarray]] = []
        for order, given in ORDERS[size]:
            seat = held.enter_context(
                runtime.reserve(num_pictures=len(order), num_tokens=16, num_neighbors=len(given.neighbors))
            )
            told = lambda picture, step, x0: None  # noqa: E731
            futures.append(seat.submit(order, given, on_step=told, is_cancelled=lambda: False))
        return [future.result(TIMEOUT_S) for future in futures]


def served(server: TritonServer, size: int, wanted: list[int]) -> dict[int, np.ndarray]:
    """These orders at once through Triton."""
    with stream(server) as opened:
        for i in wanted:
            order, given = ORDERS[size][i]
            opened.send(stage(size).name, StageRequest(plans=order, inputs=given), name=str(i))
        said = opened.finish({str(i) for i in wanted})
    pictures = {i: said[str(i)][-1].pictures for i in wanted}
    return {i: drawn for i, drawn in pictures.items() if drawn is not None}


@pytest.mark.parametrize("size", CASES)
def test_triton_the_runtime_and_a_plain_loop_draw_the_same(
    triton_server: TritonServer, unets: dict[int, UNet], size: int
) -> None:
    numbers = list(range(len(ORDERS[size])))
    looped = [plain_loop(unets[size], order) for order in ORDERS[size]]
    together = served(triton_server, size, numbers)
    for i, embedded in enumerate(in_process(unets[size], size)):
        assert np.abs(embedded - looped[i]).max() < TOLERANCE, f"runtime, order {i}"
    for i in numbers:
        assert np.abs(together[i] - looped[i]).max() < TOLERANCE, f"Triton, order {i}"
        assert np.abs(served(triton_server, size, [i])[i] - looped[i]).max() < TOLERANCE, f"Triton alone, order {i}"


def test_batches_are_shared_and_every_step_is_run_once(triton_server: TritonServer) -> None:
    names = ("reimagen_stage_passes_total", "reimagen_stage_trajectory_steps_total")
    wait_until(lambda: figure(triton_server, "reimagen_stage_live_requests", "unet_64") == 0)
    before = [figure(triton_server, name, "unet_64") for name in names]
    orders = [(plans(64, seed, 40), text_inputs(seed, 2)) for seed in range(4)]
    with stream(triton_server) as opened:
        for i, (order, given) in enumerate(orders):
            opened.send("unet_64", StageRequest(plans=order, inputs=given), name=str(i))
        said = opened.finish({str(i) for i in range(4)})
    wait_until(lambda: figure(triton_server, "reimagen_stage_live_requests", "unet_64") == 0)
    wait_until(lambda: figure(triton_server, names[1], "unet_64") >= before[1] + 4 * 40)
    passes, steps = (figure(triton_server, name, "unet_64") - b for name, b in zip(names, before, strict=True))
    assert steps == 4 * 40, "a step was run twice, or never"
    assert steps / passes > 3, f"{passes:.0f} passes for {steps:.0f} steps: batches are not shared"
    for responses in said.values():
        assert [response.steps for response in responses] == [(step,) for step in range(1, 41)]


def test_previews_come_when_asked_for(triton_server: TritonServer) -> None:
    order, given = ORDERS[64][1]
    with stream(triton_server) as opened:
        opened.send("unet_64", StageRequest(plans=order, inputs=given, preview_every=2), name="a")
        responses = opened.finish({"a"})["a"]
    assert [sorted(response.previews) for response in responses] == [[], [0, 1], [], [0, 1], []]
    for response in responses[1:4:2]:
        assert response.previews[1].shape == (3, 64, 64) and np.abs(response.previews[1]).max() <= 1
    assert responses[-1].pictures is not None and responses[-1].pictures.shape == (2, 3, 64, 64)
    assert all(response.pictures is None and response.model is None for response in responses[:-1])
