"""Orders: what is refused by name, and that everything that is not refused changes a plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from common.diffusion.randomness import MAX_SEED
from common.service.errors import InvalidArgument
from generator_svc.order import Order, StageOverrides, StageReads, check_order

READS = {
    64: StageReads(text=True, neighbors=True),
    256: StageReads(text=False, neighbors=False),
    1024: StageReads(text=True, neighbors=False),
}
ORDER = Order(prompt="a guide dog", seed=7)


def test_the_defaults() -> None:
    checked = check_order(Order(prompt="  a \n guide\tdog "), READS)
    assert checked.order.prompt == "a guide dog"
    assert checked.k == 2 and 0 <= checked.seed <= MAX_SEED
    assert [plan.stage for plan in checked.plans] == [64, 256, 1024]
    assert all(plan.seed == checked.seed for plan in checked.plans)
    assert check_order(Order(prompt="a guide dog"), READS).seed != checked.seed


def test_pictures_differ_in_sample_alone() -> None:
    checked = check_order(replace(ORDER, num_pictures=3), READS)
    plans = checked.stage_plans(checked.plans[0])
    assert [plan.sample for plan in plans] == [0, 1, 2]
    assert {replace(plan, sample=0) for plan in plans} == {checked.plans[0]}


@pytest.mark.parametrize(
    ("changes", "field", "named"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n"}, "prompt", "empty"),
        ({"prompt": "x" * 10_000}, "prompt", "10000"),
        ({"k": 65}, "k", "65"),
        ({"excluded_pair_ids": ("x",) * 1001}, "excluded_pair_ids", "1001"),
        ({"num_pictures": 9}, "num_pictures", "9"),
        ({"num_pictures": 0}, "num_pictures", "0"),
        ({"seed": 2**63}, "seed", str(2**63)),
        ({"seed": -1}, "seed", "-1"),
        ({"stop_at": 128}, "stop_at", "128"),
        ({"without_neighbors": True, "k": 2}, "k", "without_neighbors"),
        ({"without_neighbors": True, "knowledge_base": "b"}, "knowledge_base", "without_neighbors"),
        ({"without_neighbors": True, "method": "METHOD_BM25"}, "method", "without_neighbors"),
        ({"without_neighbors": True, "excluded_pair_ids": ("x",)}, "excluded_pair_ids", "without_neighbors"),
        ({"without_neighbors": True, "exclude_exact": True}, "exclude_exact", "without_neighbors"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], field: str, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named) as caught:
        check_order(replace(ORDER, **changes), READS)
    assert caught.value.violations[0][0] == field


@pytest.mark.parametrize(
    ("stage", "changes", "field", "named"),
    [
        (128, {}, "stage", "128"),
        (64, {"steps": 0}, "steps", "0"),
        (64, {"steps": 1001}, "steps", "1001"),
        (64, {"text_weight": -1.0}, "text_weight", "-1"),
        (64, {"text_weight": math.nan}, "text_weight", "nan"),
        (64, {"neighbor_weight": 101.0}, "neighbor_weight", "101"),
        (64, {"eta": 1.5}, "eta", "1.5"),
        (64, {"augmentation": 0.1}, "augmentation", "no low-resolution input"),
        (256, {"augmentation": 1.0}, "augmentation", "1.0"),
        (256, {"text_weight": 2.0}, "text_weight", "neither text nor neighbors"),
        (256, {"guidance_strategy": "weighted"}, "guidance_strategy", "neither text nor neighbors"),
        (1024, {"eta": 0.1}, "eta", "joint guidance has one weight"),
        (1024, {"guidance_strategy": "weighted", "neighbor_weight": 2.0}, "neighbor_weight", "no neighbors"),
        (64, {"guidance_strategy": "joint", "neighbor_weight": 2.0}, "neighbor_weight", "joint"),
    ],
)
def test_overrides_that_cannot_be_are_refused(stage: int, changes: dict[str, Any], field: str, named: str) -> None:
    order = replace(ORDER, stages=(StageOverrides(stage=stage, **changes),))
    with pytest.raises(InvalidArgument, match=named) as caught:
        check_order(order, READS)
    assert caught.value.violations[0][0] == f"stages[0].{field}"


def test_a_stage_is_named_once_and_run() -> None:
    twice = (StageOverrides(stage=64, steps=2), StageOverrides(stage=64, eta=0.1))
    with pytest.raises(InvalidArgument, match="named twice") as caught:
        check_order(replace(ORDER, stages=twice), READS)
    assert caught.value.violations[0][0] == "stages[1].stage"
    with pytest.raises(InvalidArgument, match="not run"):
        check_order(replace(ORDER, stop_at=64, stages=(StageOverrides(stage=256, steps=2),)), READS)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (64, {"steps": 3}),
        (64, {"sampler": "dpmpp_2m"}),
        (64, {"guidance_strategy": "interleaved"}),
        (64, {"text_weight": 3.0}),
        (64, {"neighbor_weight": 3.0}),
        (64, {"eta": 0.25}),
        (64, {"thresholding": "none"}),
        (256, {"augmentation": 0.1}),
        (256, {"sampler": "ddpm"}),
        (1024, {"text_weight": 3.0}),
        (1024, {"guidance_strategy": "interleaved", "eta": 0.25}),
    ],
)
def test_every_override_changes_its_plan_alone(stage: int, changes: dict[str, Any]) -> None:
    overridden = replace(ORDER, stages=(StageOverrides(stage=stage, **changes),))
    before, after = check_order(ORDER, READS).plans, check_order(overridden, READS).plans
    assert [b.stage for b, a in zip(before, after, strict=True) if b != a] == [stage]
    plan = next(plan for plan in after if plan.stage == stage)
    for name, value in changes.items():
        place = plan if hasattr(plan, name) else plan.guidance
        assert getattr(place, name.removeprefix("guidance_")) == value


def test_without_neighbors_text_alone_guides() -> None:
    base, small, _ = check_order(replace(ORDER, without_neighbors=True), READS).plans
    assert base.guidance.strategy == "joint"
    assert small == check_order(ORDER, READS).plans[1]
    interleaved = StageOverrides(stage=64, guidance_strategy="interleaved", eta=0.3)
    order = replace(ORDER, without_neighbors=True, stages=(interleaved,))
    assert check_order(order, READS).plans[0].guidance.eta == 0.3
    with pytest.raises(InvalidArgument, match="no neighbors"):
        check_order(replace(order, stages=(replace(interleaved, neighbor_weight=2.0),)), READS)
