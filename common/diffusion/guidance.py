"""Guidance as four coefficients: how one step mixes the predictions under four conditions.

Columns of a coefficient row: full (text and neighbors), neighbors only, text only, none. A row sums to 1, so that mixing
eps, v or x0 is the same; a zero means that the pass is not run. Re-Imagen, section 3.3, equation 6 and appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Strategy = Literal["interleaved", "weighted", "joint"]
STRATEGIES: tuple[Strategy, ...] = ("interleaved", "weighted", "joint")
BRANCHES: tuple[tuple[bool, bool], ...] = ((True, True), (False, True), (True, False), (False, False))
"""(text kept, neighbors kept) of each column."""
MAX_WEIGHT = 100.0


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A strategy with its weights.

    Attributes:
        strategy: `interleaved`, `weighted` or `joint`.
        text_weight: w_p, the guidance weight of text; joint uses it alone (w).
        neighbor_weight: w_n, the guidance weight of neighbors.
        eta: share of text steps in [0, 1].
    """

    strategy: Strategy
    text_weight: float
    neighbor_weight: float
    eta: float

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"guidance.strategy: {self.strategy!r} is not one of {STRATEGIES}")
        for name, weight in (("text_weight", self.text_weight), ("neighbor_weight", self.neighbor_weight)):
            if not is_number(weight) or not 0.0 <= weight <= MAX_WEIGHT:
                raise ValueError(f"guidance.{name}: {weight!r} is not in [0, {MAX_WEIGHT:g}]")
        if not is_number(self.eta) or not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"guidance.eta: {self.eta!r} is not in [0, 1]")


def is_number(value: object) -> bool:
    """Whether it is an int or a float: a boolean or a string out of JSON is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def coefficients(guidance: Guidance, draws: np.ndarray) -> np.ndarray:
    """The coefficient rows of a trajectory.

    Args:
        guidance: strategy and weights.
        draws: R of every step, uniform on [0, 1) [N]; a text step where R < eta (interleaved alone reads them).

    Returns:
        float64 [N, 4], each row summing to 1.
    """
    w_p, w_n, eta = guidance.text_weight, guidance.neighbor_weight, guidance.eta
    text_step = np.array([w_p, -(w_p - 1.0), 0.0, 0.0])
    neighbor_step = np.array([w_n, 0.0, -(w_n - 1.0), 0.0])
    draws = np.asarray(draws, np.float64)
    if guidance.strategy == "interleaved":
        return np.where((draws < eta)[:, None], text_step, neighbor_step)
    if guidance.strategy == "weighted":
        row = eta * text_step + (1.0 - eta) * neighbor_step
    else:
        row = np.array([w_p, 0.0, 0.0, -(w_p - 1.0)])
    return np.tile(row, (len(draws), 1))


def leaves_text_out(guidance: Guidance) -> bool:
    """Whether some step, whatever is drawn for it, asks for a prediction without the text."""
    text_step, neighbor_step = 0.0, np.nextafter(1.0, 0.0)
    rows = coefficients(guidance, np.array([text_step, neighbor_step]))
    return bool(np.any(rows[:, [not text for text, _ in BRANCHES]]))


def mix(predictions: dict[int, Any], row: np.ndarray) -> Any:
    """Sum of row[c] * predictions[c] over the columns that were run; columns with a zero need not be there."""
    total: Any = 0.0
    for column in np.flatnonzero(row):
        total = total + float(row[column]) * predictions[int(column)]
    return total
