"""What an ablation of costs recommends: the cheapest system that is not measurably worse than the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.ablations.rows import Ablation
from evaluation.entitydraw.figures import VALUES
from evaluation.entitydraw.results import ScoreRow
from evaluation.scores.intervals import compare

RULE = "the lowest on the axis that is behind the best system in no figure by more than chance (95 %, paired by prompt)"


def recommend(row: Ablation, scores: Sequence[ScoreRow], systems: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Which system the row recommends, and why.

    A system qualifies if for each of the row's figures the interval of the best system's value less its own reaches 0.
    Of those the lowest on the axis is taken; of several there, the one with the greatest last figure. None may: then `system`
    is empty.

    Args:
        systems: of the row's figures, as `run_figures` gives them.
    """
    drawn = {p.system.name: [s for s in scores if s.system == p.system.name] for p in row.points}
    names = [name for name, found in drawn.items() if found]

    def value(name: str, figure: str) -> float:
        said = systems[name]["all"].get(figure)
        return said["estimate"] if said else float("-inf")

    best = {figure: max(names, key=lambda name: value(name, figure)) for figure in row.figures}
    behind: dict[str, list[str]] = {}
    for name in names:
        for figure, first in best.items():
            if name != first and _is_behind(drawn[name], drawn[first], figure):
                behind.setdefault(name, []).append(figure)
    place = {point.system.name: point.x for point in row.points}
    fit = [name for name in names if name not in behind]
    chosen = min(fit, key=lambda name: (place[name], -value(name, row.figures[-1])), default="")
    return {"system": chosen, "best": best, "behind": behind, "rule": RULE}


def _is_behind(scores: Sequence[ScoreRow], best: Sequence[ScoreRow], figure: str) -> bool:
    """Whether the best is better by more than chance, on the pictures of which both are known."""
    read = VALUES[figure]
    ours = {score.key[1:]: read(score.scores) for score in scores}
    told = [(score.prompt_id, read(score.scores), ours.get(score.key[1:])) for score in best]
    known = [(prompt, a, b) for prompt, a, b in told if a is not None and b is not None]
    if not known:
        return bool(best)  # of what was not measured nobody knows that it is as good
    prompts, theirs, own = zip(*known, strict=True)
    low = compare(theirs, own, prompts).difference.low
    return low is not None and low > 0.0
