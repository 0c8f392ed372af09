"""The stage table: a cascade that fits together, on the paper's schedules."""

from __future__ import annotations

from dataclasses import fields

import pytest

from common.diffusion.plan import Plan
from common.stages import STAGES, StageSpec, stage


def test_the_cascade_is_64_256_1024() -> None:
    assert [s.size for s in STAGES] == [64, 256, 1024]
    assert [s.low_res_size for s in STAGES] == [0, 64, 256], "each stage starts from what the one before made"
    assert [s.scale for s in STAGES] == [1, 4, 4]
    assert [s.name for s in STAGES] == ["unet_64", "unet_256", "unet_1024"]


def test_schedules_are_imagens() -> None:
    assert [s.schedule for s in STAGES] == ["cosine", "cosine", "linear"]
    assert STAGES[0].thresholding == "dynamic"


def test_the_first_stage_attends_to_neighbors() -> None:
    assert STAGES[0].neighbors
    assert STAGES[0].train_augmentation == 0.0


@pytest.mark.parametrize("spec", STAGES)
def test_sampling_augments_no_more_than_training_did(spec: StageSpec) -> None:
    assert 0.0 <= spec.augmentation <= spec.train_augmentation < 1.0


@pytest.mark.parametrize("spec", STAGES)
def test_the_default_plan_takes_every_field_it_shares(spec: StageSpec) -> None:
    plan = spec.plan(seed=3, sample=2)
    shared = {f.name for f in fields(Plan)} & {f.name for f in fields(StageSpec)}
    assert shared >= {"schedule", "steps", "sampler", "guidance", "thresholding", "augmentation"}
    assert {n: getattr(plan, n) for n in shared} == {n: getattr(spec, n) for n in shared}
    assert (plan.stage, plan.seed, plan.sample) == (spec.size, 3, 2)
    assert len(plan.table()) == spec.steps


def test_stage_by_size() -> None:
    assert stage(256) is STAGES[1]
    with pytest.raises(ValueError, match="stage: 128"):
        stage(128)
