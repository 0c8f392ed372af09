"""Averages of the weights over training: classic, and power functions whose length is chosen afterwards.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), section 3 and
appendix C. A power-function average weighs the weights of step t by t^gamma; any such profile can be put together from
stored averages of two others, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST, LONGEST = 0.01, 0.28  # relative widths; a flat profile, gamma = 0, has 1 / sqrt(12)


def classic_share(step: int, decay: float) -> float:
    """By how much an exponential average moves towards the weights after `step` steps; its decay warms up."""
    return 1.0 - min(decay, (1 + step) / (10 + step))


# Equation 127: beta(t) = (1 - 1 / t)^(gamma + 1)
def power_share(step: int, length: float) -> float:
    """By how much a power-function average of relative width `length` moves towards the weights after `step` steps."""
    return 1.0 - (1.0 - 1.0 / max(step, 1)) ** (gamma_of(length) + 1.0)


# sigma_rel^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1, algorithm 2
def gamma_of(length: float) -> float:
    """Exponent of the profile whose standard deviation is `length` of the time trained.

    Raises:
        ValueError: no profile is that short or long.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"average length: {length} is outside of {SHORTEST} to {LONGEST}")
    roots = np.roots([1.0, 7.0, 16.0 - length**-2, 12.0 - length**-2])
    return float(roots.real.max())


def inner_product(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """Integral over t of the product of two profiles, each (gamma + 1) t^gamma / T^(gamma + 1) up to its T."""
    together = gamma_a + gamma_b + 1.0
    first = min(t_a, t_b)
    log_value = together * np.log(first) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return float((gamma_a + 1) * (gamma_b + 1) / together * np.exp(log_value))


# Algorithm 3: minimize || sum_i x_i p_i - p ||^2
def combination(stored: Sequence[tuple[int, float]], step: int, length: float) -> np.ndarray:
    """Weights float64 [N] by which stored averages are summed to the average of `length` at `step`.

    Args:
        stored: (step, length) of each average.
    """
    profiles = [(float(t), gamma_of(one)) for t, one in stored]
    wanted = (float(step), gamma_of(length))
    products = np.array([[inner_product(*a, *b) for b in profiles] for a in profiles])
    return np.linalg.lstsq(products, np.array([inner_product(*a, *wanted) for a in profiles]), rcond=None)[0]
