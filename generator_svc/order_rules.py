"""Orders are checked and made into plans: what can be wrong with one is refused here, by the name of a field."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace

from common.diffusion.guidance import leaves_text_out
from common.diffusion.plan import MAX_STEPS, MIN_START_TIME
from common.diffusion.randomness import MAX_SEED
from common.prompt import check_prompt
from common.service.errors import InvalidArgument
from generator_svc.order import DEFAULT_K, MAX_K, MAX_PICTURES, SIZES, CheckedOrder, Order, StageReads
from generator_svc.picture_files import check_size_and_kind
from generator_svc.plain_text import MAX_TEXT_CHARACTERS, check_plain, field_and_reason
from generator_svc.stage_plans import listed, make_plans

MAX_EXCLUDED_PAIRS = 1000
MAX_NAME_CHARACTERS = 500  # of a knowledge base, a pair id, an author, a source, a license


def check_order(order: Order, reads: Mapping[int, StageReads]) -> CheckedOrder:
    """Check everything that can be wrong whatever the state of the service, and make the plans.

    Args:
        reads: what each stage's weights are conditioned on.

    Raises:
        InvalidArgument: names the field and the value.
    """
    order = replace(order, prompt=_prompt(order.prompt), negative_prompt=_negative_prompt(order.negative_prompt))
    check_common(order)
    first, last = _start_stage(order), SIZES[-1] if order.stop_at is None else order.stop_at
    if last not in SIZES:
        raise InvalidArgument("stop_at", f"{last} is not one of {listed(SIZES)}")
    if first > last:
        raise InvalidArgument("start_from.stage", f"{first} is not run: stop_at is {last}")
    sizes = tuple(size for size in SIZES if first <= size <= last)
    k = _k(order, any(reads[size].neighbors for size in sizes))
    samples = _samples(order)
    stages = tuple(
        tuple(replace(plan, seed=seed, sample=sample) for seed, sample in samples)
        for plan in make_plans(order, sizes, reads)
    )
    checked = CheckedOrder(order=order, k=k, stages=stages)
    if order.negative_prompt:
        _refuse_idle_negative(checked, reads)
    return checked


def check_common(order: Order) -> None:
    """What is wrong with or without a record.

    Raises:
        InvalidArgument: names the field and the value.
    """
    if not 0 <= order.preview_every <= MAX_STEPS:
        raise InvalidArgument("preview_every", f"{order.preview_every} is not between 0 and {MAX_STEPS}")
    check_plain("knowledge_base", order.knowledge_base, MAX_NAME_CHARACTERS)
    if len(order.excluded_pair_ids) > MAX_EXCLUDED_PAIRS:
        raise InvalidArgument(
            "excluded_pair_ids", f"holds {len(order.excluded_pair_ids)} ids; at most {MAX_EXCLUDED_PAIRS} are taken"
        )
    for i, pair_id in enumerate(order.excluded_pair_ids):
        if not pair_id:
            raise InvalidArgument(f"excluded_pair_ids[{i}]", "is empty")
        check_plain(f"excluded_pair_ids[{i}]", pair_id, MAX_NAME_CHARACTERS)
    if len(order.references) > MAX_K:
        raise InvalidArgument("references", f"holds {len(order.references)} pairs; at most {MAX_K} are taken")
    for i, reference in enumerate(order.references):
        check_plain(f"references[{i}].caption", reference.caption, MAX_TEXT_CHARACTERS)
        for name in ("author", "source", "license"):
            check_plain(f"references[{i}].{name}", getattr(reference, name), MAX_NAME_CHARACTERS)
        check_size_and_kind(f"references[{i}].image", reference.image)
    if order.start_from is not None:
        check_size_and_kind("start_from.image", order.start_from.image)


def without_retrieved(checked: CheckedOrder, reads: Mapping[int, StageReads]) -> CheckedOrder:
    """The same order drawn without retrieved neighbors, since there are none to be had.

    Where no neighbor is left, guidance becomes plain guidance by text, as `without_neighbors` has it, unless the caller
    has chosen a strategy.
    """
    if checked.order.references:
        return checked
    chosen = {overrides.stage for overrides in checked.order.stages if overrides.guidance_strategy}
    stages = tuple(
        tuple(replace(plan, guidance=replace(plan.guidance, strategy="joint")) for plan in plans)
        if reads[plans[0].stage].neighbors and plans[0].stage not in chosen
        else plans
        for plans in checked.stages
    )
    return replace(checked, stages=stages)


def _prompt(prompt: str) -> str:
    try:
        cleaned = check_prompt(prompt)
    except ValueError as error:
        raise InvalidArgument(*field_and_reason(error)) from None
    check_plain("prompt", cleaned, MAX_TEXT_CHARACTERS)
    return cleaned


def _negative_prompt(prompt: str) -> str:
    cleaned = " ".join(prompt.split())
    if prompt and not cleaned:
        raise InvalidArgument("negative_prompt", "is white space alone: would change nothing")
    check_plain("negative_prompt", cleaned, MAX_TEXT_CHARACTERS)
    return cleaned


def _start_stage(order: Order) -> int:
    if order.start_from is None:
        return SIZES[0]
    stage, strength = order.start_from.stage or SIZES[0], order.start_from.strength
    if stage not in SIZES:
        raise InvalidArgument("start_from.stage", f"{stage} is not one of {listed(SIZES)}")
    if strength is not None and not MIN_START_TIME <= strength <= 1.0:
        raise InvalidArgument("start_from.strength", f"{strength} is not between {MIN_START_TIME:g} and 1")
    if strength == 1.0 and stage == SIZES[0]:
        raise InvalidArgument("start_from.strength", f"{strength} keeps nothing of the picture in stage {stage}")
    return stage


def _k(order: Order, reads_neighbors: bool) -> int:
    """Neighbors that retrieval is asked for. A field about neighbors that would change nothing is refused."""
    asked = {
        "k": order.k is not None,
        "knowledge_base": bool(order.knowledge_base),
        "method": bool(order.method),
        "excluded_pair_ids": bool(order.excluded_pair_ids),
        "exclude_exact": order.exclude_exact,
    }
    if order.without_neighbors or not reads_neighbors:
        reason = (
            "without_neighbors asks for no neighbors" if order.without_neighbors else "no stage that is run reads them"
        )
        _refuse(asked | {"references": bool(order.references)}, reason)
        return 0
    num_references = len(order.references)
    if order.k is None and num_references:
        _refuse(asked, "there are references, and k asks for no other neighbors")
        return 0
    k = DEFAULT_K if order.k is None else order.k
    if not 1 <= k <= MAX_K:
        raise InvalidArgument("k", f"{k} is not between 1 and {MAX_K}")
    if k + num_references > MAX_K:
        raise InvalidArgument("k", f"{k} with {num_references} references is more than {MAX_K}")
    return k


def _refuse(given: Mapping[str, bool], reason: str) -> None:
    for field, is_given in given.items():
        if is_given:
            raise InvalidArgument(field, f"would change nothing: {reason}")


def _samples(order: Order) -> list[tuple[int, int]]:
    """(seed, sample) of each picture."""
    if len(order.seeds) > MAX_PICTURES:
        raise InvalidArgument("seeds", f"holds {len(order.seeds)} seeds; at most {MAX_PICTURES} are taken")
    num_pictures = (len(order.seeds) or 1) if order.num_pictures is None else order.num_pictures
    if not 1 <= num_pictures <= MAX_PICTURES:
        raise InvalidArgument("num_pictures", f"{num_pictures} is not between 1 and {MAX_PICTURES}")
    if not order.seeds:
        seed = secrets.randbelow(MAX_SEED + 1) if order.seed is None else order.seed
        _check_seed("seed", seed)
        return [(seed, sample) for sample in range(num_pictures)]
    if order.seed is not None:
        raise InvalidArgument("seed", f"{order.seed} is given beside seeds")
    if num_pictures != len(order.seeds):
        raise InvalidArgument("num_pictures", f"{num_pictures} is not the number of seeds, {len(order.seeds)}")
    for i, seed in enumerate(order.seeds):
        _check_seed(f"seeds[{i}]", seed)
    return [(seed, 0) for seed in order.seeds]


def _check_seed(field: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise InvalidArgument(field, f"{seed} is not between 0 and {MAX_SEED} (2^63 - 1)")


def _refuse_idle_negative(checked: CheckedOrder, reads: Mapping[int, StageReads]) -> None:
    reading = [plans[0] for plans in checked.stages if reads[plans[0].stage].text]
    if not any(leaves_text_out(plan.guidance) for plan in reading):
        raise InvalidArgument("negative_prompt", "would change nothing: guidance never leaves the prompt out")
