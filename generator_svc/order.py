"""What is asked for, checked and made into plans: the only place that refuses a request by the name of a field."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.diffusion.guidance import Strategy
from common.diffusion.plan import Plan
from common.diffusion.randomness import MAX_SEED
from common.diffusion.sampler import Sampler
from common.diffusion.threshold import Thresholding
from common.prompt import check_prompt
from common.service.errors import InvalidArgument
from common.stages import STAGES, StageSpec

DEFAULT_K, MAX_K = 2, 64
MAX_PICTURES = 8
MAX_EXCLUDED_PAIRS = 1000
SIZES = tuple(spec.size for spec in STAGES)


@dataclass(frozen=True, kw_only=True)
class StageOverrides:
    """Departures of one stage from its defaults; None keeps the default. The fields are those of `Plan`."""

    stage: int
    steps: int | None = None
    sampler: Sampler | None = None
    guidance_strategy: Strategy | None = None
    text_weight: float | None = None
    neighbor_weight: float | None = None
    eta: float | None = None
    thresholding: Thresholding | None = None
    augmentation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request, in the words of generator.proto.

    Attributes:
        k: neighbors wanted; None where nothing was said.
        method: the retrieval method's name, e.g. `METHOD_BM25`; empty leaves it to retrieval.
        seed: None until one is drawn.
    """

    prompt: str
    k: int | None = None
    knowledge_base: str = ""
    method: str = ""
    excluded_pair_ids: tuple[str, ...] = ()
    exclude_exact: bool = False
    without_neighbors: bool = False
    num_pictures: int = 1
    seed: int | None = None
    stop_at: int = SIZES[-1]
    stages: tuple[StageOverrides, ...] = ()
    preview_every: int = 0


@dataclass(frozen=True, kw_only=True)
class StageReads:
    """What a stage's weights are conditioned on."""

    text: bool
    neighbors: bool


@dataclass(frozen=True, kw_only=True)
class CheckedOrder:
    """An order that can be carried out.

    Attributes:
        order: with its prompt cleaned, its seed drawn and its k filled in (0 without neighbors).
        plans: of every stage to be run, in order, for picture 0; another picture's differ in `sample` alone.
    """

    order: Order
    seed: int
    k: int
    plans: tuple[Plan, ...]

    def stage_plans(self, plan: Plan) -> tuple[Plan, ...]:
        """The plan of each picture."""
        return tuple(replace(plan, sample=sample) for sample in range(self.order.num_pictures))


def check_order(order: Order, reads: Mapping[int, StageReads]) -> CheckedOrder:
    """Check everything that can be wrong whatever the state of the service, and make the plans.

    Args:
        reads: what each stage's weights are conditioned on.

    Raises:
        InvalidArgument: names the field and the value.
    """
    prompt = _prompt(order.prompt)
    if order.without_neighbors:
        _refuse_retrieval_fields(order)
    k = 0 if order.without_neighbors else DEFAULT_K if order.k is None else order.k
    if not 0 <= k <= MAX_K:
        raise InvalidArgument("k", f"{k} is not between 1 and {MAX_K}")
    if len(order.excluded_pair_ids) > MAX_EXCLUDED_PAIRS:
        raise InvalidArgument(
            "excluded_pair_ids", f"holds {len(order.excluded_pair_ids)} ids; at most {MAX_EXCLUDED_PAIRS} are taken"
        )
    if not 1 <= order.num_pictures <= MAX_PICTURES:
        raise InvalidArgument("num_pictures", f"{order.num_pictures} is not between 1 and {MAX_PICTURES}")
    seed = secrets.randbelow(MAX_SEED + 1) if order.seed is None else order.seed
    if not 0 <= seed <= MAX_SEED:
        raise InvalidArgument("seed", f"{seed} is not between 0 and {MAX_SEED} (2^63 - 1)")
    if order.stop_at not in SIZES:
        raise InvalidArgument("stop_at", f"{order.stop_at} is not one of {_list(SIZES)}")
    overrides = _by_stage(order)
    plans = tuple(
        _plan(spec, seed, reads[spec.size], *overrides.get(spec.size, (StageOverrides(stage=spec.size), "")), order)
        for spec in STAGES
        if spec.size <= order.stop_at
    )
    return CheckedOrder(order=replace(order, prompt=prompt, seed=seed, k=k), seed=seed, k=k, plans=plans)


def _prompt(prompt: str) -> str:
    try:
        return check_prompt(prompt)
    except ValueError as error:
        raise InvalidArgument(*_field_and_reason(error)) from None


def _refuse_retrieval_fields(order: Order) -> None:
    given = {
        "k": order.k is not None,
        "knowledge_base": bool(order.knowledge_base),
        "method": bool(order.method),
        "excluded_pair_ids": bool(order.excluded_pair_ids),
        "exclude_exact": order.exclude_exact,
    }
    for field, is_given in given.items():
        if is_given:
            raise InvalidArgument(field, "would change nothing: without_neighbors asks for no neighbors")


def _by_stage(order: Order) -> dict[int, tuple[StageOverrides, str]]:
    """Overrides with the field's name in the request, by stage."""
    found: dict[int, tuple[StageOverrides, str]] = {}
    for i, overrides in enumerate(order.stages):
        field = f"stages[{i}]"
        if overrides.stage not in SIZES:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is not one of {_list(SIZES)}")
        if overrides.stage in found:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is named twice")
        if overrides.stage > order.stop_at:
            raise InvalidArgument(f"{field}.stage", f"{overrides.stage} is not run: stop_at is {order.stop_at}")
        found[overrides.stage] = (overrides, field)
    return found


def _plan(spec: StageSpec, seed: int, reads: StageReads, overrides: StageOverrides, field: str, order: Order) -> Plan:
    plan = spec.plan(seed)
    guidance = plan.guidance
    if order.without_neighbors and reads.neighbors:
        # Nothing tells a neighbor step from an unguided one here: plain guidance by text is the fair comparison.
        guidance = replace(guidance, strategy="joint")
    strategy = overrides.guidance_strategy or guidance.strategy
    _refuse_idle(overrides, field, reads, strategy, order.without_neighbors)
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
        name, reason = _field_and_reason(error)
        raise InvalidArgument(f"{field}.{name.removeprefix('guidance.')}", reason) from None


def _refuse_idle(
    overrides: StageOverrides, field: str, reads: StageReads, strategy: Strategy, without_neighbors: bool
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
    elif without_neighbors or not reads.neighbors:
        reasons["neighbor_weight"] = f"there are no neighbors in stage {overrides.stage}"
    for name, reason in reasons.items():
        if getattr(overrides, name) is not None:
            raise InvalidArgument(f"{field}.{name}", f"would change nothing: {reason}")


def _field_and_reason(error: ValueError) -> tuple[str, str]:
    """The two halves of "field: reason", as `common` writes its errors."""
    field, _, reason = str(error).partition(": ")
    return field, reason


def _list(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
