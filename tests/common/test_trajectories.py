"""Trajectories side by side: a picture never depends on what it was batched with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.conditioning import keep
from common.diffusion.guidance import Guidance, Strategy
from common.diffusion.parameterization import diffuse
from common.diffusion.plan import Plan
from common.diffusion.sampler import Sampler, trajectory
from common.diffusion.schedule import alpha_sigma, log_snr
from common.trajectories import Trajectory, begin, noised_low_res, run_together, step_together, under_text
from common.unet.condition import Condition, concatenate
from common.unet.unet import UNet

SIDE = 16


def plan(
    sampler: Sampler = "ddim", steps: int = 5, strategy: Strategy = "interleaved", seed: int = 7, **changes: Any
) -> Plan:
    guidance = Guidance(strategy=strategy, text_weight=2.0, neighbor_weight=1.5, eta=0.5)
    made = Plan(
        stage=SIDE,
        schedule="cosine",
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        thresholding="dynamic",
        seed=seed,
    )
    return replace(made, **changes)


MIXED = [
    plan(),
    plan("ddpm", steps=9, strategy="weighted", seed=8),
    plan("dpmpp_2m", steps=3, strategy="joint", seed=9, thresholding="static"),
    plan("ddpm", steps=9, seed=8, sample=1),
    plan("ddim", steps=1, schedule="linear", thresholding="none"),
]


@pytest.fixture
def unet(base_config, make_unet) -> UNet:
    made = make_unet(base_config, torch.float32)
    return made.eval().requires_grad_(False)


@pytest.fixture
def conditions(base_config, unet: UNet, make_inputs) -> list[Condition]:
    """One condition a plan, of different lengths and numbers of neighbors."""
    made = []
    for i in range(len(MIXED)):
        inputs = make_inputs(
            base_config, batch=1, num_tokens=3 + i, num_neighbors=1 + i % 3, dtype=torch.float32, seed=i
        )
        made.append(unet.condition(**{n: v for n, v in inputs.items() if n not in ("x_t", "log_snr")}))
    return made


def alone(unet: UNet, one: Plan, condition: Condition) -> Tensor:
    return run_together(unet, "v", [one], condition)[0]


def test_a_batch_of_mixed_plans_equals_lone_runs(unet: UNet, conditions: list[Condition]) -> None:
    together = run_together(unet, "v", MIXED, concatenate(conditions))
    for row, (one, condition) in enumerate(zip(MIXED, conditions, strict=True)):
        torch.testing.assert_close(together[row], alone(unet, one, condition), atol=1e-5, rtol=1e-5, msg=str(one))


def test_joining_late_changes_nothing(unet: UNet, conditions: list[Condition]) -> None:
    """Continuous batching: a trajectory that is joined in its middle ends where it ends alone."""
    first, second = begin(MIXED[1], conditions[1]), begin(MIXED[0], conditions[0])
    for _ in range(3):
        step_together(unet, "v", [first])
    while live := [t for t in (second, first) if not t.done]:
        step_together(unet, "v", live)
    torch.testing.assert_close(first.x_t, alone(unet, MIXED[1], conditions[1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.x_t, alone(unet, MIXED[0], conditions[0]), atol=1e-5, rtol=1e-5)


def test_one_without_neighbors_joins_others(unet: UNet, base_config, make_inputs, conditions: list[Condition]) -> None:
    inputs = make_inputs(base_config, batch=1, num_neighbors=0, dtype=torch.float32)
    bare = unet.condition(**{n: v for n, v in inputs.items() if n not in ("x_t", "log_snr")})
    lone = [alone(unet, MIXED[0], bare), alone(unet, MIXED[1], conditions[1])]
    live = [begin(MIXED[0], bare), begin(MIXED[1], conditions[1])]
    while running := [t for t in live if not t.done]:
        step_together(unet, "v", running)
    for trajectory_, expected in zip(live, lone, strict=True):
        torch.testing.assert_close(trajectory_.x_t, expected, atol=1e-5, rtol=1e-5)


def test_ancestral_noise_is_the_samples_own(unet: UNet, conditions: list[Condition]) -> None:
    """With a network that says nothing, only noise decides: to the bit the same alone, first or last in a batch."""
    torch.nn.init.zeros_(unet.head.weight)
    torch.nn.init.zeros_(unet.head.bias)
    assert unet.copy is not None and unet.copy.score.bias is not None
    torch.nn.init.constant_(unet.copy.score.bias, -1e4)  # nothing is taken over from the neighbors either
    noisy = [plan("ddpm", steps=6, seed=s, thresholding="none") for s in (1, 2, 3)]
    condition = concatenate([conditions[0]] * 3)
    forwards = run_together(unet, "v", noisy, condition)
    backwards = run_together(unet, "v", noisy[::-1], condition).flip(0)
    lone = torch.stack([alone(unet, one, conditions[0]) for one in noisy])
    torch.testing.assert_close(forwards, lone, atol=0, rtol=0)
    torch.testing.assert_close(backwards, lone, atol=0, rtol=0)
    steps = begin(noisy[0], conditions[0])
    step_together(unet, "v", [steps])
    with_other = begin(replace(noisy[0], sample=1), conditions[0])
    step_together(unet, "v", [with_other])
    assert (steps.x_t != with_other.x_t).all()


def test_the_loop_is_the_samplers_loop(unet: UNet, conditions: list[Condition]) -> None:
    """Stepping together is `trajectory` with the U-Net asked under each branch's condition."""
    one, condition = MIXED[1], conditions[1]
    branches = {0: (True, True), 1: (False, True), 2: (True, False), 3: (False, False)}

    def denoise(x_t: Tensor, log_snr_t: float, columns: tuple[int, ...]) -> dict[int, Tensor]:
        rows = {}
        for column in columns:
            text, neighbors = (torch.tensor([kept]) for kept in branches[column])
            rows[column] = unet.denoise(
                x_t[None], torch.tensor([log_snr_t]), keep(condition, text, neighbors), bold=True
            )[0]
        return rows

    source = one.step_noise()
    with torch.inference_mode():
        steps = trajectory(
            denoise,
            one.table(),
            torch.from_numpy(one.start()),
            prediction="v",
            thresholding=one.thresholding,
            noise=lambda: torch.from_numpy(source.standard_normal((3, SIDE, SIDE), dtype=np.float32)),
        )
        last = list(steps)[-1][1]
    torch.testing.assert_close(alone(unet, one, condition), last, atol=1e-5, rtol=1e-5)


def finished(unet: UNet, live: list[Trajectory]) -> list[Tensor]:
    while running := [t for t in live if not t.done]:
        step_together(unet, "v", running)
    return [t.x_t for t in live]


@pytest.fixture
def negatives(base_config, unet: UNet, make_inputs, conditions: list[Condition]) -> list[Condition]:
    """Each of `conditions` under another text, of another length."""
    made = []
    for i, condition in enumerate(conditions):
        inputs = make_inputs(base_config, batch=1, num_tokens=7 - i, num_neighbors=1, dtype=torch.float32, seed=90 + i)
        made.append(under_text(unet, condition, inputs["text"], inputs["text_mask"]))
    return made


def test_another_text_with_the_same_neighbors_is_computed_as_a_whole_condition_is(
    unet: UNet, base_config, make_inputs
) -> None:
    inputs = make_inputs(base_config, batch=1, num_tokens=5, num_neighbors=2, dtype=torch.float32, seed=1)
    given = {n: v for n, v in inputs.items() if n not in ("x_t", "log_snr")}
    other = make_inputs(base_config, batch=1, num_tokens=3, num_neighbors=2, dtype=torch.float32, seed=2)
    texts = {"text": other["text"], "text_mask": other["text_mask"]}
    whole, shared = unet.condition(**given | texts), under_text(unet, unet.condition(**given), **texts)
    for mine, its in zip(shared.text + shared.neighbors, whole.text + whole.neighbors, strict=True):
        torch.testing.assert_close(mine, its)
    for name in ("text_mask", "text_embedding", "placement", "neighbor_mask", "pictures", "low_res", "augmentation"):
        torch.testing.assert_close(getattr(shared, name), getattr(whole, name), msg=name)


@pytest.mark.parametrize("strategy", ["interleaved", "weighted", "joint"])
def test_the_negative_text_stands_wherever_guidance_leaves_the_text_out(
    unet: UNet, conditions: list[Condition], negatives: list[Condition], strategy: Strategy
) -> None:
    one, condition, negative = plan(strategy=strategy, steps=6), conditions[1], negatives[1]
    asked: set[int] = set()

    def denoise(x_t: Tensor, log_snr_t: float, columns: tuple[int, ...]) -> dict[int, Tensor]:
        kept = {
            0: condition,
            1: negative,
            2: keep(condition, torch.tensor([True]), torch.tensor([False])),
            3: keep(negative, torch.tensor([True]), torch.tensor([False])),
        }
        asked.update(columns)
        return {c: unet.denoise(x_t[None], torch.tensor([log_snr_t]), kept[c], bold=True)[0] for c in columns}

    with torch.inference_mode():
        start = torch.from_numpy(one.start())
        steps = trajectory(
            denoise,
            one.table(),
            start,
            prediction="v",
            thresholding="dynamic",
            noise=lambda: torch.zeros(3, SIDE, SIDE),
        )
        last = list(steps)[-1][1]
    (drawn,) = finished(unet, [begin(one, condition, negative=negative)])
    torch.testing.assert_close(drawn, last, atol=1e-5, rtol=1e-5)
    assert asked == {"interleaved": {0, 1, 2}, "weighted": {0, 1, 2}, "joint": {0, 3}}[strategy]
    assert (drawn - alone(unet, one, condition)).abs().max() > 1e-3, "it says nothing"


def test_trajectories_with_and_without_negative_texts_and_pictures_share_batches(
    unet: UNet, conditions: list[Condition], negatives: list[Condition]
) -> None:
    picture = np.linspace(-1, 1, 3 * SIDE * SIDE, dtype=np.float32).reshape(3, SIDE, SIDE)

    def all_of_them() -> list[Trajectory]:
        return [
            begin(MIXED[0], conditions[0], negative=negatives[0]),
            begin(MIXED[1], conditions[1]),
            begin(replace(MIXED[2], start_time=0.4), conditions[2], negative=negatives[2], start=picture),
            begin(replace(MIXED[3], start_time=0.7), conditions[3], start=picture),
        ]

    lone = [finished(unet, [each])[0] for each in all_of_them()]
    for together, expected in zip(finished(unet, all_of_them()), lone, strict=True):
        torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


def test_the_earlier_it_starts_the_more_it_keeps_of_the_picture(unet: UNet, conditions: list[Condition]) -> None:
    torch.nn.init.zeros_(unet.head.weight)  # a network that says v = 0: x0 = alpha x_t
    torch.nn.init.zeros_(unet.head.bias)
    picture = torch.linspace(-1, 1, 3 * SIDE * SIDE).reshape(3, SIDE, SIDE)
    away = []
    for start_time in (0.1, 0.4, 0.7, 1.0):
        one = plan(start_time=start_time, thresholding="none")
        (drawn,) = finished(unet, [begin(one, conditions[0], start=picture.numpy())])
        away.append(float((drawn - picture).abs().mean()))
    assert away == sorted(away) and away[0] < 0.2 < away[-1]


def test_only_branches_with_weight_are_run(unet: UNet, conditions: list[Condition]) -> None:
    rows: list[int] = []
    unet.register_forward_hook(lambda module, given, said: rows.append(len(said)))
    run_together(unet, "v", [plan(strategy="interleaved", steps=2)], conditions[0])
    run_together(unet, "v", [plan(strategy="weighted", steps=2)], conditions[0])
    unguided = Guidance(strategy="joint", text_weight=1.0, neighbor_weight=1.0, eta=1.0)
    run_together(unet, "v", [plan(steps=2, guidance=unguided)], conditions[0])
    assert rows == [2, 2, 3, 3, 1, 1]


def test_steps_are_counted_until_the_longest_is_done(unet: UNet, conditions: list[Condition]) -> None:
    counted: list[int] = []
    run_together(unet, "v", MIXED, concatenate(conditions), on_step=counted.append)
    assert counted == list(range(1, 10))


def test_the_same_request_twice_is_the_same_to_the_bit(unet: UNet, conditions: list[Condition]) -> None:
    condition = concatenate(conditions)
    torch.testing.assert_close(
        run_together(unet, "v", MIXED, condition), run_together(unet, "v", MIXED, condition), atol=0, rtol=0
    )


def test_seeds_weights_and_neighbors_matter(unet: UNet, conditions: list[Condition]) -> None:
    said = alone(unet, MIXED[0], conditions[0])
    for other in (plan(seed=8), plan(sample=1), plan(strategy="joint"), plan("ddpm"), plan(steps=6)):
        assert (alone(unet, other, conditions[0]) - said).abs().max() > 1e-3
    assert (alone(unet, MIXED[0], conditions[1]) - said).abs().max() > 1e-4


def test_thresholded_pictures_are_in_range(unet: UNet, conditions: list[Condition]) -> None:
    for kind in ("static", "dynamic"):
        assert alone(unet, plan(thresholding=kind), conditions[0]).abs().max() <= 1.0 + 1e-6


def test_low_res_is_noised_as_the_plan_says() -> None:
    low_res = torch.linspace(-1, 1, 3 * 16).reshape(3, 4, 4)
    clean, level = noised_low_res(plan(), low_res)
    torch.testing.assert_close(clean, low_res[None])
    assert level.item() == pytest.approx(float(log_snr("cosine", 0.0)))
    augmented = plan(augmentation=0.3)
    noised, level = noised_low_res(augmented, low_res)
    assert level.item() == pytest.approx(float(log_snr("cosine", 0.3)), rel=1e-6)
    alpha, sigma = alpha_sigma(log_snr("cosine", 0.3))
    expected = diffuse(low_res.numpy(), augmented.augmentation_noise((3, 4, 4)), alpha, sigma)
    np.testing.assert_allclose(noised[0].numpy(), expected, atol=1e-6)
