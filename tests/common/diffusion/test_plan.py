"""Plans: data that survives JSON, refuses nonsense by name, and decides everything random."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.diffusion.guidance import STRATEGIES, Guidance
from common.diffusion.plan import MAX_SAMPLE, MAX_STAGE, MAX_STEPS, MIN_START_TIME, Plan
from common.diffusion.randomness import MAX_SEED
from common.diffusion.sampler import SAMPLERS
from common.diffusion.schedule import SCHEDULES, log_snr
from common.diffusion.threshold import THRESHOLDINGS

GUIDANCE = Guidance(strategy="interleaved", text_weight=3.0, neighbor_weight=2.0, eta=0.5)
PLAN = Plan(stage=16, schedule="cosine", steps=6, sampler="ddim", guidance=GUIDANCE, thresholding="dynamic", seed=11)
PLANS = st.builds(
    Plan,
    stage=st.sampled_from((64, 256, 1024)),
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, MAX_STEPS),
    sampler=st.sampled_from(SAMPLERS),
    guidance=st.builds(
        Guidance,
        strategy=st.sampled_from(STRATEGIES),
        text_weight=st.floats(0, 100),
        neighbor_weight=st.floats(0, 100),
        eta=st.floats(0, 1),
    ),
    thresholding=st.sampled_from(THRESHOLDINGS),
    seed=st.integers(0, MAX_SEED),
    sample=st.integers(0, MAX_SAMPLE),
    augmentation=st.floats(0, 1, exclude_max=True),
    start_time=st.floats(MIN_START_TIME, 1),
)


@given(PLANS)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(PLANS)
def test_tables_are_finite_and_end_at_the_picture(plan: Plan) -> None:
    table = plan.table()
    assert len(table) == plan.steps
    for column in (table.a, table.b, table.c, table.d, table.alpha, table.sigma, table.guidance, table.log_snr):
        assert np.isfinite(column).all()
    # The last step ends at x0 alone (first order, no noise): what static thresholding bounds is the picture.
    assert (table.a[-1], table.c[-1], table.d[-1]) == (0.0, 0.0, 0.0)
    assert table.b[-1] == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(table.guidance.sum(1), 1.0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 50, MAX_STEPS])
def test_times_go_evenly_from_one(steps: int) -> None:
    times = replace(PLAN, steps=steps).times()
    np.testing.assert_allclose(times, [1 - i / steps for i in range(steps)], atol=1e-12)
    np.testing.assert_allclose(replace(PLAN, steps=steps).table().log_snr, log_snr("cosine", times))


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_times_go_evenly_from_the_start_time(steps: int) -> None:
    later = replace(PLAN, steps=steps, start_time=0.4)
    np.testing.assert_allclose(later.times(), [0.4 * (1 - i / steps) for i in range(steps)], atol=1e-12)
    np.testing.assert_allclose(later.table().log_snr, log_snr("cosine", later.times()))


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("start_time", [0.001, 0.3, 1.0])
def test_a_trajectory_begins_with_the_picture_noised_to_its_start(kind: Any, start_time: float) -> None:
    """x_start = alpha x + sigma eps: eps is the noise that it would begin with alone, alpha^2 = 1 / (1 + exp(-lambda))."""
    picture = np.linspace(-1, 1, 3 * 16 * 16).reshape(3, 16, 16).astype(np.float32)
    plan = replace(PLAN, schedule=kind, start_time=start_time)
    alpha = np.sqrt(1 / (1 + np.exp(-log_snr(kind, start_time))))
    expected = alpha * picture + np.sqrt(1 - alpha**2) * PLAN.start()
    start = plan.start(picture)
    assert start.dtype == np.float32
    np.testing.assert_allclose(start, expected, atol=1e-6)


def test_a_start_without_a_picture_or_with_one_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start_time: 0\.5 begins with a picture"):
        replace(PLAN, start_time=0.5).start()
    with pytest.raises(ValueError, match=r"start: \[3, 8, 8\] is not \[3, 16, 16\]"):
        replace(PLAN, start_time=0.5).start(np.zeros((3, 8, 8), np.float32))


def test_a_plan_from_before_start_times_begins_with_noise() -> None:
    document = PLAN.to_json()
    del document["start_time"]
    assert Plan.from_json(document) == PLAN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", MAX_STEPS + 1),
        ("sampler", "euler"),
        ("schedule", "sigmoid"),
        ("thresholding", "soft"),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("sample", -1),
        ("stage", 0),
        ("stage", -64),
        ("augmentation", 1.0),
        ("augmentation", -0.1),
        ("augmentation", float("nan")),
        ("augmentation", True),
        ("augmentation", "0.5"),
        ("stage", MAX_STAGE + 1),
        ("sample", MAX_SAMPLE + 1),
        ("start_time", 0.0),
        ("start_time", 1.1),
        ("start_time", float("nan")),
        ("start_time", float("inf")),
        ("start_time", False),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    """At once, by name and value: a plan comes from a client, and is executed far from where it was made."""
    with pytest.raises(ValueError, match=rf"{name}: .*{value!s}"):
        replace(PLAN, **{name: value})


@pytest.mark.parametrize("name", ["steps", "seed", "sample", "stage"])
def test_a_fraction_where_a_whole_number_belongs_is_refused(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        replace(PLAN, **{name: 2.5})


@pytest.mark.parametrize("change", [{"steps_": 3}, {"guidance": PLAN.to_json()["guidance"] | {"w": 1.0}}])
def test_unknown_names_are_type_errors(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Plan.from_json(PLAN.to_json() | change)


@pytest.mark.parametrize("missing", ["stage", "schedule", "steps", "sampler", "guidance", "thresholding", "seed"])
def test_missing_names_are_type_errors(missing: str) -> None:
    document = PLAN.to_json()
    del document[missing]
    with pytest.raises(TypeError, match=missing):
        Plan.from_json(document)


def test_guidance_out_of_range_in_json_is_named() -> None:
    document = json.loads(json.dumps(PLAN.to_json()))
    document["guidance"]["eta"] = 2
    with pytest.raises(ValueError, match=r"guidance\.eta: 2"):
        Plan.from_json(document)


def test_everything_random_follows_seed_stage_and_sample() -> None:
    again = replace(PLAN)
    np.testing.assert_array_equal(PLAN.start(), again.start())
    np.testing.assert_array_equal(PLAN.table().guidance, again.table().guidance)
    np.testing.assert_array_equal(PLAN.augmentation_noise((3, 4, 4)), again.augmentation_noise((3, 4, 4)))
    np.testing.assert_array_equal(PLAN.step_noise().random(4), again.step_noise().random(4))
    for change in ({"seed": 12}, {"sample": 1}):
        other = replace(PLAN, **change)
        assert (PLAN.start() != other.start()).all()
        assert (PLAN.augmentation_noise((3, 4, 4)) != other.augmentation_noise((3, 4, 4))).all()
        assert (PLAN.step_noise().random(4) != other.step_noise().random(4)).all()
    assert (replace(PLAN, stage=64).start()[:, :16, :16] != PLAN.start()).all()


def test_starting_noise_does_not_follow_from_what_is_not_random() -> None:
    """Two plans that differ in weights, steps or sampler start from one noise: a person can compare them."""
    for change in ({"steps": 20}, {"sampler": "ddpm"}, {"guidance": replace(GUIDANCE, text_weight=9.0)}):
        np.testing.assert_array_equal(replace(PLAN, **change).start(), PLAN.start())


def test_starting_noise_is_standard_normal_of_the_stage() -> None:
    start = replace(PLAN, stage=64).start()
    assert start.shape == (3, 64, 64)
    assert start.dtype == np.float32
    assert abs(start.mean()) < 0.03
    assert start.std() == pytest.approx(1.0, abs=0.02)


def test_eta_is_the_share_of_text_steps() -> None:
    for eta in (0.2, 0.5, 0.9):
        table = replace(PLAN, steps=MAX_STEPS, guidance=replace(GUIDANCE, eta=eta)).table()
        assert (table.guidance[:, 1] == -2.0).mean() == pytest.approx(eta, abs=0.05)
        assert (table.guidance[:, 2] == -1.0).mean() == pytest.approx(1 - eta, abs=0.05)


def test_branches_do_not_repeat_from_sample_to_sample() -> None:
    rows = [replace(PLAN, steps=64, sample=i).table().guidance[:, 1] for i in range(4)]
    assert len({r.tobytes() for r in rows}) == 4


@pytest.mark.parametrize("kind", SCHEDULES)
def test_augmentation_level_is_the_schedules(kind: Any) -> None:
    plan = replace(PLAN, schedule=kind, augmentation=0.25)
    assert plan.augmentation_log_snr() == pytest.approx(float(log_snr(kind, 0.25)))
    assert replace(plan, augmentation=0.0).augmentation_log_snr() == pytest.approx(float(log_snr(kind, 0.0)))
