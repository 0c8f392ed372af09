"""The stages' default plans, with an order's departures from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.diffusion.guidance import Guidance, Strategy
from common.diffusion.plan import Plan
from common.service.errors import InvalidArgument
from common.stages import STAGES, StageSpec
from generator_svc.order import DEFAULT_STRENGTH, SIZES, Order, StageOverrides, StageReads
from generator_svc.plain_text import field_and_reason

GUIDING = 2.0  # least weight that is not said, of who asks for a way of guidance or for what is not to be drawn


def make_plans(order: Order, sizes: Sequence[int], reads: Mapping[int, StageReads]) -> tuple[Plan, ...]:
    """A plan for each of the stages `sizes`; its seed and sample are not the order's yet.

    Raises:
        InvalidArgument: names the field and the value.
    """
    overrides = _by_stage(order, sizes)
    has_neighbors = bool(order.references) or not order.without_neighbors
    plans: list[Plan] = []
    for spec in (spec for spec in STAGES if spec.size in sizes):
        departures, field = overrides.get(spec.size, (StageOverrides(stage=spec.size), ""))
        plan = _plan(spec, reads[spec.size], departures, field, has_neighbors, bool(order.negative_prompt))
        plans.append(plan if plans else replace(plan, start_time=_start_time(order, spec.size)))
    return tuple(plans)


def _start_time(order: Order, size: int) -> float:
    start = order.start_from
    if start is None:
        return 1.0
    return DEFAULT_STRENGTH.get(size, 1.0) if start.strength is None else start.strength


def _by_stage(order: Order, sizes: Sequence[int]) -> dict[int, tuple[StageOverrides, str]]:
    """Overrides with the field's name in the request, by stage."""
    found: dict[int, tuple[StageOverrides, str]] = {}
    for i, overrides in enumerate(order.stages):
        field = f"stages[{i}]"
        if overrides.stage not in SIZES:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is not one of {listed(SIZES)}")
        if overrides.stage in found:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is named twice")
        if overrides.stage > sizes[-1]:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is not run: stop_at is {sizes[-1]}")
        if overrides.stage < sizes[0]:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is not run: start_from.stage is {sizes[0]}")
        found[overrides.stage] = (overrides, field)
    return found


def _plan(
    spec: StageSpec,
    reads: StageReads,
    overrides: StageOverrides,
    field: str,
    has_neighbors: bool,
    has_negative: bool,
) -> Plan:
    plan = spec.plan(seed=0)
    guidance = plan.guidance
    if not has_neighbors and reads.neighbors:
        # Nothing tells a neighbor step from an unguided one here: plain guidance by text is the fair comparison.
        guidance = replace(guidance, strategy="joint")
    if has_negative or overrides.guidance_strategy is not None or overrides.eta is not None:
        guidance = _guiding(guidance)
    strategy = overrides.guidance_strategy or guidance.strategy
    _refuse_idle(overrides, field, reads, strategy, has_neighbors)
    changes: dict[str, Any] = {
        name: value
        for name in ("steps", "sampler", "thresholding", "augmentation")
        if (value := getattr(overrides, name)) is not None
    }
    weights: dict[str, Any] = {
        name: value
        for name in ("text_weight", "neighbor_weight", "eta")
        if (value := getattr(overrides, name)) is not None
    }
    try:
        return replace(plan, guidance=replace(guidance, strategy=strategy, **weights), **changes)
    except ValueError as error:
        name, reason = field_and_reason(error)
        raise InvalidArgument(f"{field}.{name.removeprefix('guidance.')}", reason) from None


def _guiding(guidance: Guidance) -> Guidance:
    """The guidance with weights that guide: what is asked for would change nothing under weights of one."""
    text, neighbors = (max(weight, GUIDING) for weight in (guidance.text_weight, guidance.neighbor_weight))
    return replace(guidance, text_weight=text, neighbor_weight=neighbors)


def _refuse_idle(
    overrides: StageOverrides, field: str, reads: StageReads, strategy: Strategy, has_neighbors: bool
) -> None:
    """Refuse what would change nothing."""
    reasons: dict[str, str] = {}
    if overrides.stage == SIZES[0]:
        reasons["augmentation"] = f"stage {overrides.stage} has no low-resolution input"
    if not reads.text and not reads.neighbors:
        reason = f"the weights of stage {overrides.stage} read neither text nor neighbors"
        reasons |= dict.fromkeys(("guidance_strategy", "text_weight", "neighbor_weight", "eta"), reason)
    elif strategy == "joint":
        reasons |= dict.fromkeys(("neighbor_weight", "eta"), "joint guidance has one weight, text_weight")
    elif not has_neighbors or not reads.neighbors:
        reasons["neighbor_weight"] = f"there are no neighbors in stage {overrides.stage}"
    for name, reason in reasons.items():
        if getattr(overrides, name) is not None:
            raise InvalidArgument(f"{field}.{name}", f"would change nothing: {reason}")


def listed(sizes: Sequence[int]) -> str:
    """For a message: "64, 256, 1024"."""
    return ", ".join(map(str, sizes))
