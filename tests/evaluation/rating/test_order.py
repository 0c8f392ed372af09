"""Who sees what when."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from evaluation.rating.items import Item
from evaluation.rating.order import OPEN_PROMPTS, Order, Rank, end_of, is_check_due

SYSTEMS = ("a", "b", "c")


def items(num_prompts: int = 30) -> list[Item]:
    return [
        Item(
            item_id=f"{system}-{prompt}",
            system=system,
            prompt_id=f"p{prompt}",
            prompt="",
            category="",
            entity="",
            frequent=True,
            pictures=(),
            references=(Path("r"),),
        )
        for system in SYSTEMS
        for prompt in range(num_prompts)
    ]


def rank_of(rater: str) -> Rank:
    return lambda text: int.from_bytes(hashlib.sha256(f"{rater}/{text}".encode()).digest()[:8], "big")


def walk(order: Order, rater: str, count: int, raters_of: dict[str, int] | None = None) -> list[Item]:
    seen: list[Item] = []
    for _ in range(count):
        item = order.next_item(rank_of(rater), [i.item_id for i in seen], raters_of or {})
        assert item is not None
        seen.append(item)
    return seen


def test_everything_is_seen_once_in_each_raters_own_order() -> None:
    order = Order(items=items())
    seen = {rater: walk(order, rater, 90) for rater in ("ada", "bo")}
    for rater, found in seen.items():
        assert {item.item_id for item in found} == {item.item_id for item in order.items}
        assert order.next_item(rank_of(rater), [item.item_id for item in found], {}) is None
    assert seen["ada"] != seen["bo"]
    assert [i.system for i in seen["ada"]] != [i.system for i in seen["bo"]], "and no turn of systems to be guessed"


def test_systems_are_even_however_early_a_rater_stops() -> None:
    seen = walk(Order(items=items()), "ada", 90)
    for stop in range(1, 91):
        votes = Counter(item.system for item in seen[:stop])
        assert max(votes.values()) - min(votes[s] for s in SYSTEMS) <= 1


def test_systems_meet_on_the_same_prompts() -> None:
    seen = walk(Order(items=items()), "ada", 60)
    of_prompt: dict[str, set[str]] = defaultdict(set)
    for item in seen:
        of_prompt[item.prompt_id].add(item.system)
    assert sum(len(systems) < len(SYSTEMS) for systems in of_prompt.values()) <= OPEN_PROMPTS


def test_pictures_of_a_prompt_do_not_follow_each_other() -> None:
    seen = walk(Order(items=items()), "ada", 70)
    assert not [one.prompt_id for one, other in pairwise(seen) if one.prompt_id == other.prompt_id]


def test_prompts_that_others_began_come_first_and_those_with_enough_last() -> None:
    raters_of = {**{f"p{i}": 1 for i in range(8)}, **{f"p{i}": 3 for i in range(8, 16)}}
    prompts = [item.prompt_id for item in walk(Order(items=items(), wanted=3), "ada", 90, raters_of)]
    first = {prompt_id: prompts.index(prompt_id) for prompt_id in dict.fromkeys(prompts)}
    started = max(first[f"p{i}"] for i in range(8))
    new = [first[f"p{i}"] for i in range(16, 30)]
    enough = min(first[f"p{i}"] for i in range(8, 16))
    assert started < sorted(new)[OPEN_PROMPTS] and max(new) < enough + 3 * OPEN_PROMPTS
    alone = [item.prompt_id for item in walk(Order(items=items(), wanted=1), "ada", 90, raters_of)]
    assert set(alone[:30]).isdisjoint(f"p{i}" for i in range(16)), "with one rater wanted, these have enough"


def test_a_system_with_fewer_pictures_does_not_stop_the_others() -> None:
    some = [item for item in items() if item.system != "a" or item.prompt_id == "p0"]
    assert len(walk(Order(items=some), "ada", len(some))) == 61


@pytest.mark.parametrize("every", [2, 5, 10])
def test_one_of_so_many_is_a_check(every: int) -> None:
    due = [is_check_due(rank_of("ada"), position, every) for position in range(100 * every)]
    assert [sum(due[i * every : (i + 1) * every]) for i in range(100)] == [1] * 100
    assert len(Counter(position % every for position, is_due in enumerate(due) if is_due)) == every, (
        "nobody knows which"
    )


def test_the_end_counts_checks_in() -> None:
    rank = rank_of("ada")
    end = end_of(rank, 0, 45, 10)
    assert end - sum(is_check_due(rank, position, 10) for position in range(end)) == 45
    assert end_of(rank, 7, 45, 0) == 52 and end_of(rank, 7, 0, 10) == 7
    assert not is_check_due(rank, 3, 0)
