"""How far forecasts may be trusted: what orders took, over what they were forecast to take, of the last ones."""

from __future__ import annotations

from collections import deque

_WINDOW = 48  # orders; a slow moment that hits all that are drawn at once is a sixth of it
_ENOUGH = 8
_QUANTILE = 0.9
_LARGEST = 2.0  # a machine that stood still for a while is no reason to refuse everybody afterwards


class Margin:
    """By what a forecast is multiplied so that nine of ten orders take no longer.

    A step's time is learnt from the orders of a moment ago; what stages take from one another, and refusals from all of
    them, is in no curve. It is in how the forecasts turned out.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    @property
    def factor(self) -> float:
        """At least 1, at most 2; 1 where too little is known."""
        if len(self._ratios) < _ENOUGH:
            return 1.0
        ordered = sorted(self._ratios)
        return min(_LARGEST, max(1.0, ordered[int(_QUANTILE * len(ordered))]))

    def learn(self, expected_s: float, took_s: float) -> None:
        """Take in how a forecast turned out; one of nothing (no stage is known yet) says nothing."""
        if expected_s > 0.0:
            self._ratios.append(took_s / expected_s)
