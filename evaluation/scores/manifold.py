"""Precision and recall of a distribution by nearest neighbors (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1, 2).

A set's manifold is the union of balls around its pictures, each reaching to its k-th nearest fellow. Precision: the share
of drawn pictures within the reference's manifold (do they look real?). Recall: the share of reference pictures within the
drawn ones' (is everything drawn that there is?). The paper has k = 3 and VGG-16 features of 50,000 pictures; here any features
may be given. A picture on the edge of a ball is outside, as in the `prdc` package.

Limits: one outlier's large ball lets much in; both figures grow with k and shrink with fewer pictures, so compare equal
sizes and equal features alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.scores.feature_rows import checked_pair, squared_distances

NEAREST = 3


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(drawn: np.ndarray, reference: np.ndarray, *, nearest: int = NEAREST) -> PrecisionRecall:
    """Of features [N, D] and [M, D].

    Raises:
        ValueError: a set has no more than `nearest` pictures, or is not finite; or their widths differ.
    """
    if nearest < 1:
        raise ValueError(f"nearest: {nearest} is below 1")
    x, y = checked_pair("drawn", drawn, "reference", reference, at_least=nearest + 1)
    return PrecisionRecall(
        precision=_share_within(x, y, _radii(y, nearest)), recall=_share_within(y, x, _radii(x, nearest))
    )


def _radii(rows: np.ndarray, nearest: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other."""
    found = np.empty(len(rows))
    for which, block in squared_distances(rows, rows):
        block[np.arange(len(block)), np.arange(which.start, which.stop)] = 0.0  # itself, whatever rounding makes of it
        found[which] = np.partition(block, nearest, axis=1)[:, nearest]
    return found


def _share_within(rows: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> float:
    return sum(int((block < radii).any(1).sum()) for _, block in squared_distances(rows, centers)) / len(rows)
