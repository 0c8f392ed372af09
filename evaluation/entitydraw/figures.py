"""What a run's scores say together: `figures.json`.

For each system, each figure is a mean over prompts with a bootstrap interval (`evaluation.scores.intervals`), over all prompts
and over parts of them (a category, frequent or infrequent entities). `entity_*` and `background`, `corner` take every picture;
`best_*` the one of each prompt that shows its entity best, as raters of the paper judge the best of four. Systems are compared
in pairs on the same prompts and seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from common.files import write_json
from evaluation.entitydraw.results import PictureRow, RunFolder, ScoreRow
from evaluation.scores.intervals import compare, mean_interval

FIGURES: dict[str, str] = {
    "best_entity_r1": "the best of a prompt's pictures is nearest to the entity that is asked for",
    "best_entity_r5": "the same, among the five nearest",
    "entity_r1": "a picture is nearest to the entity that is asked for",
    "entity_r5": "the same, among the five nearest",
    "entity_mrr": "mean of 1 / rank of the entity",
    "background": "the background has the color that the prompt names",
    "corner": "the entity lies in the corner that the prompt names",
    "text": "all of these that the prompt names",
    "style": "a classifier takes the picture for one of the style that the prompt names",
    "near_copy": "the picture is one of its neighbors, pasted",
    "other_r1": "a picture is nearest to the second entity, of systems that have one",
    "entity_likeness": "likeness to the picture that is asked for, at most 1",
    "neighbors_right": "share of the retrieved neighbors that are of the entity",
}
"""Every figure by its name, in the order in which they are shown."""
COMPARED = ("entity_r1", "entity_mrr", "text", "style")

Value = Callable[[Mapping[str, float | None]], float | None]


def _text(scores: Mapping[str, float | None]) -> float | None:
    named = [value for name in ("background", "corner") if (value := scores.get(name)) is not None]
    return float(all(named)) if named else None


VALUES: dict[str, Value] = {
    "entity_r1": lambda scores: scores.get("entity_r1"),
    "entity_r5": lambda scores: scores.get("entity_r5"),
    "entity_mrr": lambda scores: scores.get("entity_rr"),
    "background": lambda scores: scores.get("background"),
    "corner": lambda scores: scores.get("corner"),
    "text": _text,
    "style": lambda scores: scores.get("style"),
    "near_copy": lambda scores: scores.get("near_copy"),
    "other_r1": lambda scores: scores.get("other_r1"),
    "entity_likeness": lambda scores: scores.get("entity_likeness"),
    "neighbors_right": lambda scores: scores.get("neighbors_right"),
}


def best_of(scores: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Of each prompt's pictures the one that shows its entity best: by rank, then by likeness."""
    of_prompt: dict[tuple[str, str], ScoreRow] = {}
    for row in scores:
        key = row.system, row.prompt_id
        if key not in of_prompt or _merit(row) > _merit(of_prompt[key]):
            of_prompt[key] = row
    return list(of_prompt.values())


def _merit(row: ScoreRow) -> tuple[float, float]:
    return row.scores.get("entity_rr") or 0.0, row.scores.get("entity_likeness") or 0.0


def figures_of(scores: Sequence[ScoreRow]) -> dict[str, Any]:
    """Every figure that applies to some of one system's pictures: estimate, low, high, prompts."""
    found: dict[str, Any] = {}
    best = best_of(scores)
    for name in FIGURES:
        plain = name.removeprefix("best_")
        values = _values(best if name != plain else scores, plain)
        if values:
            interval = mean_interval([v for _, v in values], [p for p, _ in values])
            found[name] = _rounded(interval.to_json())
    return found


def _values(scores: Iterable[ScoreRow], name: str) -> list[tuple[str, float]]:
    pairs = ((row.prompt_id, VALUES[name](row.scores)) for row in scores)
    return [(prompt, value) for prompt, value in pairs if value is not None]


def parts_of(rows: Sequence[PictureRow]) -> dict[str, set[str]]:
    """Prompt ids by part."""
    parts: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        parts[f"category/{row.category}"].add(row.prompt_id)
        parts["frequent" if row.frequent else "infrequent"].add(row.prompt_id)
    return dict(sorted(parts.items()))


def compare_systems(first: Sequence[ScoreRow], second: Sequence[ScoreRow]) -> dict[str, Any]:
    """First less second, on the pictures that both have."""
    theirs = {(row.prompt_id, row.seed): row for row in second}
    both = [(row, theirs[row.prompt_id, row.seed]) for row in first if (row.prompt_id, row.seed) in theirs]
    found: dict[str, Any] = {}
    for name in COMPARED:
        told = [(a.prompt_id, VALUES[name](a.scores), VALUES[name](b.scores)) for a, b in both]
        known = [(prompt, a, b) for prompt, a, b in told if a is not None and b is not None]
        if known:
            prompts, ours, others = zip(*known, strict=True)
            found[name] = _rounded(compare(ours, others, prompts).to_json())
    return found


def run_figures(
    rows: Sequence[PictureRow],
    scores: Sequence[ScoreRow],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of a run, by system, and the comparisons of its systems.

    Args:
        pairs: which systems are compared, by name; None: each with each.
        order: of the systems, by name; those that it does not name come last.
    """
    by_system: dict[str, list[ScoreRow]] = defaultdict(list)
    for score in scores:
        by_system[score.system].append(score)
    systems = [name for name in order if name in by_system] + sorted(set(by_system) - set(order))
    parts = parts_of(rows)
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.seconds is not None:
            seconds[row.system].append(row.seconds)
    return {
        "figures": dict(FIGURES),
        "systems": {
            system: {
                "pictures": len(found),
                "seconds_a_picture": round(float(np.median(seconds[system])), 4) if seconds[system] else None,
                "all": figures_of(found),
                "parts": {part: figures_of([r for r in found if r.prompt_id in ids]) for part, ids in parts.items()},
            }
            for system, found in ((name, by_system[name]) for name in systems)
        },
        "comparisons": [
            {"first": first, "second": second, **compare_systems(by_system[first], by_system[second])}
            for first, second in (combinations(systems, 2) if pairs is None else pairs)
        ],
    }


def write_figures(folder: RunFolder, figures: Mapping[str, Any]) -> None:
    """Write `figures.json`."""
    write_json(folder.figures_file, dict(figures))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
