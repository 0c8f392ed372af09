"""Entity faithfulness: is the picture nearer to the entity that was asked for than to others?

A drawn picture is compared, in an encoder's space, with the true pictures of many entities (a gallery), its own among them.
R@1 and R@5 are the shares of pictures whose own entity is among the 1 or 5 nearest; MRR is the mean of 1 / rank. Ties count
against: who draws the same for everything has found nothing. As in Re-Imagen's EntityDrawBench several pictures may be
drawn of a prompt and the best one judged (`best_of`).

Encoders: `hand_made` (`evaluation.features`: gradients and colors, place by place; nothing was trained), or the `images` of
any `retrieval_svc.clip.ClipEmbedder`.

Limits: the figures belong to a gallery and an encoder. Hand-made features take an entity that is moved or turned for
another; the packaged encoder knows the training entities' styles; a copied neighbor scores well (see `copies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.features import SIDE, entity_features
from evaluation.scores.feature_rows import checked_rows
from evaluation.scores.intervals import Interval, mean_interval
from evaluation.scores.sides import shrunk_to

CUTOFFS = (1, 5)

Encoder = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Features [N, D] of uint8 pictures [H, W, 3]; the dot product of two rows is their likeness."""


@dataclass(frozen=True, kw_only=True)
class EntityFigures:
    """Over prompts, with intervals."""

    r1: Interval
    r5: Interval
    mrr: Interval


def hand_made(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Hand-made features of square pictures of 64, 128, 256, ... pixels."""
    return np.stack([entity_features(shrunk_to(picture, SIDE)) for picture in pictures])


def entity_ranks(drawn: np.ndarray, galleries: Sequence[np.ndarray], targets: Sequence[int]) -> np.ndarray:
    """Rank (1 is best) of row `targets[i]` of gallery i [M, D] by likeness to drawn picture i of [N, D].

    Raises:
        ValueError: lengths or widths differ, a target is not in its gallery, or a number is not finite.
    """
    rows = checked_rows("drawn", drawn)
    if not len(rows) == len(galleries) == len(targets):
        raise ValueError(f"drawn: {len(rows)} pictures, {len(galleries)} galleries and {len(targets)} targets")
    checked: dict[int, np.ndarray] = {}
    found = np.empty(len(rows), np.int64)
    for i, (gallery, target) in enumerate(zip(galleries, targets, strict=True)):
        if id(gallery) not in checked:  # many prompts share one
            checked[id(gallery)] = checked_rows(f"galleries[{i}]", gallery)
        truth = checked[id(gallery)]
        if truth.shape[1] != rows.shape[1] or not 0 <= target < len(truth):
            raise ValueError(f"targets[{i}]: {target} of a gallery {list(truth.shape)}, drawn is {list(rows.shape)}")
        likeness = truth @ rows[i]
        found[i] = (likeness >= likeness[target]).sum()
    return found


def best_of(ranks: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """The best rank of each prompt's pictures [P], prompts in the order of their first picture."""
    if len(prompts) != len(ranks):
        raise ValueError(f"prompts: {len(prompts)} for {len(ranks)} ranks")
    best: dict[Hashable, int] = {}
    for rank, prompt in zip(ranks, prompts, strict=True):
        best[prompt] = min(int(rank), best.get(prompt, int(rank)))
    return np.array(list(best.values()), np.int64)


def found_within(ranks: np.ndarray, cutoff: int) -> np.ndarray:
    """1.0 where the rank is within the cutoff: what is averaged for R@k, and compared by `intervals.compare`."""
    return (np.asarray(ranks) <= cutoff).astype(np.float64)


def entity_figures(ranks: np.ndarray, prompts: Sequence[Hashable] | None = None) -> EntityFigures:
    """R@1, R@5 and MRR of ranks [N].

    Raises:
        ValueError: there is none, or one is below 1.
    """
    if len(ranks) and np.min(ranks) < 1:
        raise ValueError(f"ranks: {int(np.min(ranks))} is below 1")
    r1, r5 = (mean_interval(found_within(ranks, cutoff), prompts) for cutoff in CUTOFFS)
    return EntityFigures(r1=r1, r5=r5, mrr=mean_interval(1.0 / np.asarray(ranks, np.float64), prompts))
