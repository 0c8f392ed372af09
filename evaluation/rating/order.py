"""Which item a rater sees next: at random, yet so that every system gets its votes, and prompts get several raters'.

A rater works through a few prompts at a time, in an order of his own; of these prompts, the items of all systems come
mixed. So systems are even within every rater's votes however early he stops, they are compared on the same prompts, and
the pictures of one prompt do not follow each other where that can be helped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from evaluation.rating.items import Item

OPEN_PROMPTS = 8  # at a time
APART = 3  # items, between two of one prompt

Rank = Callable[[str], int]  # of a rater: a number for any text, without rhyme or reason


@dataclass(frozen=True, kw_only=True)
class Order:
    """Orders items.

    Attributes:
        items: all there are.
        wanted: raters a prompt should get: prompts that others have begun come first, those that have enough last.
    """

    items: Sequence[Item]
    wanted: int = 3

    def next_item(self, rank: Rank, voted: Sequence[str], raters_of: Mapping[str, int]) -> Item | None:
        """The item that a rater sees next; None where he has rated all.

        Args:
            rank: the rater's.
            voted: items the rater voted on, in order.
            raters_of: by prompt, how many other raters voted on it.
        """
        done = set(voted)
        by_id = {item.item_id: item for item in self.items}
        history = [by_id[item_id] for item_id in voted if item_id in by_id]
        open_items = self._open(rank, done, {item.prompt_id for item in history}, raters_of)
        if not open_items:
            return None
        recent = {item.prompt_id for item in history[-APART:]}
        votes = Counter(item.system for item in history)
        least = min(votes[item.system] for item in open_items)
        fair = [item for item in open_items if votes[item.system] == least]
        fresh = [item for item in fair if item.prompt_id not in recent]
        return min(fresh or fair, key=lambda item: rank(item.item_id))

    def _open(
        self, rank: Rank, done: Collection[str], begun: Collection[str], raters_of: Mapping[str, int]
    ) -> list[Item]:
        """What is left of the prompts that the rater has begun, filled up with new ones."""
        left: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            if item.item_id not in done:
                left[item.prompt_id].append(item)

        def place(prompt_id: str) -> tuple[int, int]:
            raters = raters_of.get(prompt_id, 0)
            urgency = 1 if raters == 0 else 0 if raters < self.wanted else 2
            return (-1 if prompt_id in begun else urgency), rank(prompt_id)

        first = sorted(left, key=place)[:OPEN_PROMPTS]
        return [item for prompt_id in first for item in left[prompt_id]]


def is_check_due(rank: Rank, position: int, every: int) -> bool:
    """Whether the rater's item at `position` (from 0) is an attention check: one of each `every`, nobody knows which."""
    return every > 0 and position % every == rank(f"check {position // every}") % every


def end_of(rank: Rank, position: int, num_left: int, every: int) -> int:
    """How many items a rater at `position` with `num_left` to rate will have seen, attention checks among them."""
    while num_left:
        num_left -= not is_check_due(rank, position, every)
        position += 1
    return position
