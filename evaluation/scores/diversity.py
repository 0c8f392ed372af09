"""Diversity between seeds: how far apart the pictures of one prompt are.

The mean distance of all pairs of a prompt's pictures, then of its means over prompts; by default one less the cosine of
their features, as LPIPS is used by Zhu et al. 2017 (arXiv 1711.11586, section 5) with another distance. 0: every seed draws
the same.

Limits: noise is diverse, too: read it beside faithfulness. A distance is an encoder's, see `entity.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from evaluation.scores.feature_rows import unit_rows
from evaluation.scores.intervals import Interval, mean_interval


def prompt_diversities(features: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """float64 [P] in [0, 2]: mean cosine distance of each prompt's pictures, prompts in the order of their first.

    Raises:
        ValueError: a prompt has one picture alone, lengths differ, or a row is not finite or all zeros.
    """
    rows = unit_rows("features", features)
    if len(prompts) != len(rows):
        raise ValueError(f"prompts: {len(prompts)} for {len(rows)} pictures")
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    lonely = next((prompt for prompt, found in members.items() if len(found) < 2), None)
    if lonely is not None:
        raise ValueError(f"prompts: {lonely!r} has one picture, diversity needs 2 at least")
    return np.array([_mean_distance(rows[found]) for found in members.values()])


def diversity(features: np.ndarray, prompts: Sequence[Hashable]) -> Interval:
    """The mean over prompts."""
    return mean_interval(prompt_diversities(features, prompts))


def _mean_distance(rows: np.ndarray) -> float:
    """The sum of all cosines is |sum of rows|^2; those of a row with itself are 1."""
    count = len(rows)
    cosines = float(np.square(rows.sum(0)).sum()) - count
    return max(0.0, 1.0 - cosines / (count * (count - 1)))
