"""CMMD: maximum mean discrepancy of CLIP embeddings (Jayasumana et al. 2024, arXiv 2401.09603, equation 4).

    1000 (E k(x, x') + E k(y, y') - 2 E k(x, y)),   k(x, y) = exp(-|x - y|^2 / (2 * 10^2))

over unit embeddings, with the V-statistic of the authors' code (a picture is compared with itself, too). It assumes no
Gaussian, and settles with far fewer pictures than FID.

Limits: the paper measures with CLIP ViT-L/14 at 336 pixels; of any other encoder the figures compare among themselves alone,
so say which one. The V-statistic is above 0 for two samples of one distribution, by about 1000 (1 - E k) (1/n + 1/m).
"""

from __future__ import annotations

import numpy as np

from evaluation.scores.feature_rows import checked_pair, squared_distances, unit_rows

SIGMA = 10.0
SCALE = 1000.0


def cmmd(drawn: np.ndarray, reference: np.ndarray) -> float:
    """The distance of two sets of embeddings [N, D] and [M, D]; their lengths do not matter.

    Raises:
        ValueError: a set is empty, not finite, or has an embedding that is all zeros; or their widths differ.
    """
    x, y = checked_pair("drawn", drawn, "reference", reference)
    x, y = unit_rows("drawn", x), unit_rows("reference", y)
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2.0 * _mean_kernel(x, y))


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    gamma = 1.0 / (2.0 * SIGMA**2)
    total = sum(float(np.exp(-gamma * block).sum()) for _, block in squared_distances(x, y))
    return total / (len(x) * len(y))
