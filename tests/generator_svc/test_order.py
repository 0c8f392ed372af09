"""Orders: what is refused by name, and that everything that is not refused changes a plan."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from common.diffusion.plan import Plan
from common.diffusion.randomness import MAX_SEED
from common.service.errors import InvalidArgument
from generator_svc.order import CheckedOrder, Order, Reference, StageOverrides, StageReads, StartFrom
from generator_svc.order_rules import check_order, without_retrieved
from generator_svc.picture_files import MAX_IMAGE_BYTES

READS = {
    64: StageReads(text=True, neighbors=True),
    256: StageReads(text=False, neighbors=False),
    1024: StageReads(text=True, neighbors=False),
}
ORDER = Order(prompt="a guide dog", seed=7)
SVG = b"<svg/>"
REFERENCE = Reference(image=SVG, caption="my dog")


def plans_of(checked: CheckedOrder) -> tuple[Plan, ...]:
    """The first picture's."""
    return tuple(plans[0] for plans in checked.stages)


def test_the_defaults() -> None:
    checked = check_order(Order(prompt="  a \n guide\tdog "), READS)
    assert checked.order.prompt == "a guide dog"
    (seed,) = checked.seeds
    assert checked.k == 2 and 0 <= seed <= MAX_SEED
    assert checked.sizes == (64, 256, 1024)
    assert all(plan.seed == seed and plan.start_time == 1.0 for plan in plans_of(checked))
    assert check_order(Order(prompt="a guide dog"), READS).seeds != checked.seeds


def test_pictures_differ_in_sample_alone() -> None:
    checked = check_order(replace(ORDER, num_pictures=3), READS)
    for plans in checked.stages:
        assert [plan.sample for plan in plans] == [0, 1, 2]
        assert {replace(plan, sample=0) for plan in plans} == {plans[0]}


def test_pictures_of_given_seeds_are_the_first_that_each_seed_draws() -> None:
    checked = check_order(replace(ORDER, seed=None, seeds=(3, 7)), READS)
    assert checked.seeds == (3, 7) and checked.num_pictures == 2
    for plans in checked.stages:
        assert [(plan.seed, plan.sample) for plan in plans] == [(3, 0), (7, 0)]
    assert plans_of(check_order(ORDER, READS)) == tuple(plans[1] for plans in checked.stages)


def test_references_stand_in_for_retrieval_unless_k_asks_for_both() -> None:
    alone = check_order(replace(ORDER, references=(REFERENCE,)), READS)
    assert (alone.k, alone.num_neighbors) == (0, 1)
    both = check_order(replace(ORDER, references=(REFERENCE,), k=3, method="METHOD_BM25"), READS)
    assert (both.k, both.num_neighbors) == (3, 4)
    assert plans_of(alone) == plans_of(check_order(ORDER, READS)), "guidance is that of neighbors"


@pytest.mark.parametrize(
    ("start", "sizes", "start_time"),
    [
        (StartFrom(image=SVG), (64, 256, 1024), 0.6),
        (StartFrom(image=SVG, stage=64, strength=0.25), (64, 256, 1024), 0.25),
        (StartFrom(image=SVG, stage=256), (256, 1024), 1.0),
        (StartFrom(image=SVG, stage=1024, strength=0.5), (1024,), 0.5),
        (StartFrom(image=SVG, stage=256, strength=1.0), (256, 1024), 1.0),
    ],
)
def test_a_picture_to_begin_with_decides_where_the_first_stage_starts(
    start: StartFrom, sizes: tuple[int, ...], start_time: float
) -> None:
    checked = check_order(replace(ORDER, start_from=start), READS)
    assert checked.sizes == sizes
    assert [plan.start_time for plan in plans_of(checked)] == [start_time, *[1.0] * (len(sizes) - 1)]
    assert checked.k == (2 if 64 in sizes else 0), "retrieval is asked for a stage that reads neighbors alone"


def test_an_order_that_retrieval_fails_is_guided_by_text() -> None:
    checked = check_order(ORDER, READS)
    assert plans_of(without_retrieved(checked, READS)) == plans_of(
        check_order(replace(ORDER, without_neighbors=True), READS)
    )
    chosen = check_order(replace(ORDER, stages=(StageOverrides(stage=64, guidance_strategy="weighted"),)), READS)
    assert without_retrieved(chosen, READS) == chosen
    references = check_order(replace(ORDER, references=(REFERENCE,), k=1), READS)
    assert without_retrieved(references, READS) == references


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
        ({"without_neighbors": True, "references": (REFERENCE,)}, "references", "without_neighbors"),
        ({"prompt": "a \0 dog"}, "prompt", r"U\+0000"),
        ({"prompt": "a \ufffe dog"}, "prompt", r"U\+FFFE"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt", "2001"),
        ({"negative_prompt": "a\0"}, "negative_prompt", r"U\+0000"),
        ({"negative_prompt": " \n"}, "negative_prompt", "white space"),
        ({"knowledge_base": "b" * 501}, "knowledge_base", "501"),
        ({"excluded_pair_ids": ("a", "")}, r"excluded_pair_ids[1]", "empty"),
        ({"excluded_pair_ids": ("a\0",)}, r"excluded_pair_ids[0]", r"U\+0000"),
        ({"preview_every": 1001}, "preview_every", "1001"),
        ({"k": 0}, "k", "0"),
        ({"references": (REFERENCE,) * 65}, "references", "65"),
        ({"references": (REFERENCE,) * 60, "k": 5}, "k", "5 with 60 references"),
        ({"references": (REFERENCE,), "method": "METHOD_BM25"}, "method", "k asks for no other"),
        ({"references": (REFERENCE,), "exclude_exact": True}, "exclude_exact", "k asks for no other"),
        ({"references": (replace(REFERENCE, image=b""),)}, "references[0].image", "empty"),
        ({"references": (REFERENCE, replace(REFERENCE, image=b"GIF89a"))}, "references[1].image", "47 49 46 38"),
        ({"references": (replace(REFERENCE, image=b"<" * (MAX_IMAGE_BYTES + 1)),)}, "references[0].image", "4194305"),
        ({"references": (replace(REFERENCE, caption="x" * 2001),)}, "references[0].caption", "2001"),
        ({"references": (replace(REFERENCE, author="\0"),)}, "references[0].author", r"U\+0000"),
        ({"references": (replace(REFERENCE, license="x" * 501),)}, "references[0].license", "501"),
        ({"seeds": (1, 2)}, "seed", "7"),
        ({"seed": None, "seeds": (1, 2), "num_pictures": 3}, "num_pictures", "3"),
        ({"seed": None, "seeds": (1, 2**63)}, "seeds[1]", str(2**63)),
        ({"seed": None, "seeds": tuple(range(9))}, "seeds", "9"),
        ({"start_from": StartFrom(image=b"")}, "start_from.image", "empty"),
        ({"start_from": StartFrom(image=b"plain text")}, "start_from.image", "none of PNG"),
        ({"start_from": StartFrom(image=SVG, stage=128)}, "start_from.stage", "128"),
        ({"start_from": StartFrom(image=SVG, stage=256), "stop_at": 64}, "start_from.stage", "stop_at is 64"),
        ({"start_from": StartFrom(image=SVG, strength=0.0)}, "start_from.strength", "0.0"),
        ({"start_from": StartFrom(image=SVG, strength=1.5)}, "start_from.strength", "1.5"),
        ({"start_from": StartFrom(image=SVG, strength=math.nan)}, "start_from.strength", "nan"),
        ({"start_from": StartFrom(image=SVG, strength=math.inf)}, "start_from.strength", "inf"),
        ({"start_from": StartFrom(image=SVG, strength=1.0)}, "start_from.strength", "keeps nothing"),
        ({"start_from": StartFrom(image=SVG, stage=256), "k": 2}, "k", "no stage that is run"),
        ({"start_from": StartFrom(image=SVG, stage=256), "references": (REFERENCE,)}, "references", "no stage"),
        (
            {"start_from": StartFrom(image=SVG, stage=256), "stages": (StageOverrides(stage=64, steps=2),)},
            "stages[0].stage",
            "start_from.stage is 256",
        ),
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
    before, after = plans_of(check_order(ORDER, READS)), plans_of(check_order(overridden, READS))
    assert [b.stage for b, a in zip(before, after, strict=True) if b != a] == [stage]
    plan = next(plan for plan in after if plan.stage == stage)
    for name, value in changes.items():
        place = plan if hasattr(plan, name) else plan.guidance
        assert getattr(place, name.removeprefix("guidance_")) == value


def test_without_neighbors_text_alone_guides() -> None:
    base, small, _ = plans_of(check_order(replace(ORDER, without_neighbors=True), READS))
    assert base.guidance.strategy == "joint"
    assert small == plans_of(check_order(ORDER, READS))[1]
    interleaved = StageOverrides(stage=64, guidance_strategy="interleaved", eta=0.3)
    order = replace(ORDER, without_neighbors=True, stages=(interleaved,))
    assert plans_of(check_order(order, READS))[0].guidance.eta == 0.3
    with pytest.raises(InvalidArgument, match="no neighbors"):
        check_order(replace(order, stages=(replace(interleaved, neighbor_weight=2.0),)), READS)


def unguided(stage: int) -> StageOverrides:
    return StageOverrides(stage=stage, guidance_strategy="joint", text_weight=1.0)


def test_a_negative_prompt_needs_a_step_that_leaves_the_text_out() -> None:
    order = replace(ORDER, negative_prompt="  a \n cat ")
    assert check_order(order, READS).order.negative_prompt == "a cat"
    with pytest.raises(InvalidArgument, match="would change nothing") as caught:
        check_order(replace(order, stages=(unguided(64), unguided(1024))), READS)
    assert caught.value.violations[0][0] == "negative_prompt"
    neighbors_alone = StageOverrides(stage=64, guidance_strategy="interleaved", eta=0.0)
    with pytest.raises(InvalidArgument, match="would change nothing"):
        check_order(replace(order, stop_at=64, stages=(neighbors_alone,)), READS)
    assert check_order(replace(order, stages=(neighbors_alone, replace(unguided(1024), text_weight=2.0))), READS)
