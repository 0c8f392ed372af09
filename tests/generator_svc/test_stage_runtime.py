"""Continuous batching: who shares a batch, that it changes nothing, and how trajectories end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.diffusion.guidance import Guidance
from common.diffusion.plan import Plan
from common.service.errors import InvalidArgument, ResourceExhausted, Unavailable
from common.stages import stage
from common.trajectories import begin
from common.unet.condition import Condition
from common.unet.unet import UNet
from generator_svc.live_bytes import live_bytes
from generator_svc.stage_inputs import StageInputs
from generator_svc.stage_runtime import StageRuntime
from tests.generator_svc.tiny_stack import tiny_unet

TIMEOUT_S = 30.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def unets() -> dict[int, UNet]:
    """Tiny networks of the first two stages."""
    return {size: tiny_unet(size) for size in (64, 256)}


@pytest.fixture
def run(unets: dict[int, UNet]) -> Iterator[Callable[..., StageRuntime]]:
    """Starts runtimes, and closes them."""
    with ExitStack() as stack:

        def start(size: int = 64, **settings: Any) -> StageRuntime:
            settings = {"max_batch": 8, "max_live_bytes": 64 * MIB} | settings
            runtime = StageRuntime(stage(size), unets[size], **settings)
            stack.callback(runtime.close)
            return runtime

        yield start


def make_inputs(num_neighbors: int, *, tokens: int = 6, number: int = 0) -> StageInputs:
    """Random conditions; `number` says which."""
    rng = np.random.default_rng(number)
    return StageInputs(
        text=rng.standard_normal((tokens, 384), np.float32),
        text_mask=np.ones(tokens, np.bool_),
        neighbors=rng.integers(0, 256, (num_neighbors, 64, 64, 3), np.uint8),
        neighbor_text=rng.standard_normal((num_neighbors, tokens, 384), np.float32),
        neighbor_text_mask=np.ones((num_neighbors, tokens), np.bool_),
        low_res=None,
    )


def make_plan(seed: int = 1, steps: int = 3, **changes: Any) -> Plan:
    """A plan of the first stage."""
    return replace(stage(64).plan(seed), steps=steps, **changes)


def submit(
    runtime: StageRuntime,
    held: ExitStack,
    inputs: StageInputs,
    *plans: Plan,
    on_step: Callable[[int, int, torch.Tensor], object] = lambda picture, step, x0: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Future[np.ndarray]:
    """Take a seat for as long as `held` lasts, and submit."""
    seat = held.enter_context(
        runtime.reserve(num_pictures=len(plans), num_tokens=len(inputs.text_mask), num_neighbors=len(inputs.neighbors))
    )
    return seat.submit(plans, inputs, on_step=on_step, is_cancelled=is_cancelled)


def draw(runtime: StageRuntime, inputs: StageInputs, *plans: Plan) -> np.ndarray:
    """The pictures of one order that is alone."""
    with ExitStack() as held:
        return submit(runtime, held, inputs, *plans).result(TIMEOUT_S)


ORDERS = (
    (make_inputs(2, number=1), make_plan(1, 3)),
    (make_inputs(1, tokens=9, number=2), make_plan(2, 5, sampler="dpmpp_2m")),
    (
        make_inputs(0, number=3),
        make_plan(3, 4, guidance=Guidance(strategy="joint", text_weight=3, neighbor_weight=1, eta=0)),
    ),
    (make_inputs(4, tokens=3, number=4), make_plan(4, 2, sampler="ddpm", thresholding="static")),
    (
        make_inputs(2, number=5),
        make_plan(5, 6, guidance=Guidance(strategy="weighted", text_weight=2, neighbor_weight=4, eta=0.5)),
    ),
)


def test_a_lone_order_gives_the_same_bytes_every_time(run: Callable[..., StageRuntime]) -> None:
    first, second = run(), run()
    inputs, plan = ORDERS[0]
    pictures = [draw(runtime, inputs, plan).tobytes() for runtime in (first, first, second)]
    assert len(set(pictures)) == 1
    assert draw(first, inputs, replace(plan, seed=2)).tobytes() != pictures[0]
    assert draw(first, replace(inputs, text=inputs.text + 1), plan).tobytes() != pictures[0]
    assert draw(first, replace(inputs, neighbors=255 - inputs.neighbors), plan).tobytes() != pictures[0]


@pytest.mark.parametrize("max_batch", [2, 8])
def test_batch_mates_change_nothing(run: Callable[..., StageRuntime], max_batch: int) -> None:
    lone = run()
    alone = [draw(lone, inputs, plan)[0] for inputs, plan in ORDERS]
    sizes: list[int] = []
    crowded = run(max_batch=max_batch, on_batch=lambda trajectories, seconds: sizes.append(trajectories))
    all_are_in = threading.Event()
    with ExitStack() as held:
        # The thread waits in the first order's steps until all others have come.
        submit(crowded, held, *ORDERS[0], on_step=lambda picture, step, x0: all_are_in.wait(TIMEOUT_S))
        futures = [submit(crowded, held, inputs, plan) for inputs, plan in ORDERS]
        all_are_in.set()
        together = [future.result(TIMEOUT_S)[0] for future in futures]
    assert max(sizes) == min(max_batch, 5)  # the order without neighbors goes alone
    for lonely, shared in zip(alone, together, strict=True):
        assert np.abs(lonely - shared).max() < 1e-4


def test_pictures_of_one_order_are_their_own(run: Callable[..., StageRuntime]) -> None:
    runtime = run()
    inputs, plan = ORDERS[0]
    both = draw(runtime, inputs, plan, replace(plan, sample=1))
    assert np.abs(both[0] - draw(runtime, inputs, plan)[0]).max() < 1e-4
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_a_newcomer_joins_between_steps(run: Callable[..., StageRuntime]) -> None:
    sizes: list[int] = []
    runtime = run(on_batch=lambda trajectories, seconds: sizes.append(trajectories))
    second: list[Future[np.ndarray]] = []
    with ExitStack() as held:

        def on_step(picture: int, step: int, x0: torch.Tensor) -> None:
            if step == 2:
                second.append(submit(runtime, held, ORDERS[1][0], make_plan(9, 6)))

        submit(runtime, held, ORDERS[0][0], make_plan(8, 5), on_step=on_step).result(TIMEOUT_S)
        second[0].result(TIMEOUT_S)
    assert sizes == [1, 1, 2, 2, 2, 1, 1, 1]


def test_cancellation_is_seen_before_the_next_step(run: Callable[..., StageRuntime]) -> None:
    runtime = run()
    steps: list[int] = []
    cancelled = threading.Event()

    def on_step(picture: int, step: int, x0: torch.Tensor) -> None:
        steps.append(step)
        if step == 3:
            cancelled.set()

    with ExitStack() as held:
        future = submit(runtime, held, ORDERS[0][0], make_plan(1, 50), on_step=on_step, is_cancelled=cancelled.is_set)
        other = submit(runtime, held, ORDERS[0][0], make_plan(2, 10))
        with pytest.raises(CancelledError):
            future.result(TIMEOUT_S)
        assert np.isfinite(other.result(TIMEOUT_S)).all()
    assert steps == [1, 2, 3]


def test_leaving_the_seat_drops_the_order(run: Callable[..., StageRuntime]) -> None:
    runtime = run()
    started = threading.Event()
    with ExitStack() as held:
        future = submit(
            runtime, held, ORDERS[0][0], make_plan(1, 1000), on_step=lambda picture, step, x0: started.set()
        )
        assert started.wait(TIMEOUT_S)
    assert future.cancelled() and runtime.taken_bytes == 0
    draw(runtime, *ORDERS[0])


def test_what_lives_is_bounded(run: Callable[..., StageRuntime]) -> None:
    runtime = run(max_live_bytes=MIB)
    with ExitStack() as held:
        inputs, _ = ORDERS[0]
        submit(runtime, held, inputs, make_plan(1, 1000))
        room = MIB // runtime.taken_bytes
        for _ in range(room - 1):
            submit(runtime, held, inputs, make_plan(1, 1000))
        with pytest.raises(ResourceExhausted, match="the limit is 1 MiB") as caught:
            submit(runtime, held, inputs, make_plan(1, 1000))
        assert room > 1 and runtime.taken_bytes <= MIB
        assert caught.value.retry_after_s
    assert runtime.taken_bytes == 0
    with pytest.raises(ResourceExhausted) as alone:
        held.enter_context(runtime.reserve(num_pictures=1000, num_tokens=6, num_neighbors=2))
    assert alone.value.retry_after_s is None, "what can never fit is not worth another try"


@pytest.mark.parametrize(("size", "num_neighbors"), [(64, 0), (64, 2), (64, 3), (256, 0)])
def test_the_bytes_are_those_of_the_tensors(unets: dict[int, UNet], size: int, num_neighbors: int) -> None:
    unet = unets[size]
    tokens = 6 if unet.config.text_width else 0
    condition: Condition = unet.condition(
        text=torch.zeros(1, tokens, unet.config.text_width),
        text_mask=torch.zeros(1, tokens, dtype=torch.bool),
        neighbors=torch.zeros(1, num_neighbors, 3, size, size),
        neighbor_text=torch.zeros(1, num_neighbors, tokens, unet.config.text_width),
        neighbor_text_mask=torch.zeros(1, num_neighbors, tokens, dtype=torch.bool),
        neighbor_mask=torch.zeros(1, num_neighbors, dtype=torch.bool),
        low_res=torch.zeros(1, 3, size // 4, size // 4) if size > 64 else None,
        augmentation=torch.zeros(1) if size > 64 else None,
    )
    trajectory = begin(replace(stage(size).plan(1), steps=1), condition)
    masks_and_level = tokens + num_neighbors + 4
    kept = condition.nbytes() - masks_and_level + trajectory.x_t.nbytes + trajectory.x0.nbytes
    assert kept == live_bytes(
        unet.config, size, num_pictures=1, num_tokens=tokens, num_neighbors=num_neighbors, element_bytes=4
    )


def test_a_failing_order_takes_no_other_along(run: Callable[..., StageRuntime]) -> None:
    runtime = run()
    inputs, plan = ORDERS[0]
    too_narrow = replace(inputs, text=inputs.text[:, :7])

    def on_step(picture: int, step: int, x0: torch.Tensor) -> None:
        raise ZeroDivisionError("whoever listens is broken")

    with ExitStack() as held:
        good = submit(runtime, held, inputs, plan)
        bad_inputs = submit(runtime, held, too_narrow, plan)
        bad_listener = submit(runtime, held, inputs, plan, on_step=on_step)
        not_finite = submit(runtime, held, replace(inputs, text=inputs.text * np.nan), plan)
        with pytest.raises(InvalidArgument, match="text"):
            bad_inputs.result(TIMEOUT_S)
        with pytest.raises(ZeroDivisionError):
            bad_listener.result(TIMEOUT_S)
        with pytest.raises(InvalidArgument, match="not finite"):
            not_finite.result(TIMEOUT_S)
        shared = good.result(TIMEOUT_S)
    assert np.abs(shared - draw(runtime, inputs, plan)).max() < 1e-4


def test_closing_fails_what_is_not_done(run: Callable[..., StageRuntime]) -> None:
    runtime = run()
    started = threading.Event()
    with ExitStack() as held:
        future = submit(
            runtime, held, ORDERS[0][0], make_plan(1, 1000), on_step=lambda picture, step, x0: started.set()
        )
        assert started.wait(TIMEOUT_S)
        runtime.close()
        with pytest.raises(Unavailable):
            future.result(TIMEOUT_S)
        with pytest.raises(Unavailable):
            submit(runtime, held, *ORDERS[0])


def test_augmentation_noises_the_input_of_super_resolution(run: Callable[..., StageRuntime]) -> None:
    runtime = run(256)
    plan = replace(stage(256).plan(3), steps=2)
    nothing = replace(
        make_inputs(0),
        text=np.zeros((0, 0), np.float32),
        text_mask=np.zeros(0, np.bool_),
        neighbor_text=np.zeros((0, 0, 0), np.float32),
        neighbor_text_mask=np.zeros((0, 0), np.bool_),
        low_res=np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32),
    )
    plans = (plan, replace(plan, sample=1))
    clean = draw(runtime, nothing, *plans)
    noised = draw(runtime, nothing, *(replace(p, augmentation=0.2) for p in plans))
    assert clean.shape == (2, 3, 256, 256)
    assert np.abs(clean - noised).max() > 0.01
    swapped = draw(runtime, replace(nothing, low_res=nothing.low_res[::-1].copy()), *plans)  # pyright: ignore[reportOptionalSubscript]
    assert np.abs(clean - swapped).max() > 0.01
