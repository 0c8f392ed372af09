"""Agreement beyond chance, beside published examples."""

from __future__ import annotations

from itertools import combinations

import pytest

from evaluation.rating.agreement import cohen_kappa, krippendorff_alpha

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units, 0: left out.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3),
    (0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0),
)
# The same, section A: two observers, ten units, answers 0 and 1.
MEG = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0)
OWEN = (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)


def test_alpha_of_four_observers_who_left_things_out() -> None:
    units = [[answer for answer in unit if answer] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_two_observers() -> None:
    assert krippendorff_alpha(list(zip(MEG, OWEN, strict=True))) == pytest.approx(0.095, abs=5e-4)


def test_alpha_by_its_meaning() -> None:
    """1 less the share of differing pairs within units over that among all answers, counted pair by pair."""
    units = [[0, 0, 1], [1, 1], [0], [0, 1, 1, 1], [0, 0]]
    kept = [unit for unit in units if len(unit) > 1]
    answers = [answer for unit in kept for answer in unit]
    within = sum(sum(a != b for a, b in combinations(unit, 2)) * 2 / (len(unit) - 1) for unit in kept) / len(answers)
    among = sum(a != b for a, b in combinations(answers, 2)) / (len(answers) * (len(answers) - 1) / 2)
    assert krippendorff_alpha(units) == pytest.approx(1 - within / among)


@pytest.mark.parametrize(("units", "alpha"), [([[0, 0], [1, 1]], 1.0), ([[1, 1], [1, 1]], None), ([[1], [0]], None)])
def test_alpha_at_its_ends(units: list[list[int]], alpha: float | None) -> None:
    assert krippendorff_alpha(units) == alpha


def test_kappa_of_two_raters() -> None:
    """Cohen's formula on a 2 x 2 table of 20, 5, 10, 15: 0.7 observed, 0.5 by chance."""
    table = {(1, 1): 20, (1, 0): 5, (0, 1): 10, (0, 0): 15}
    pairs = [pair for pair, count in table.items() for _ in range(count)]
    first, second = ({f"i{n}": pair[side] for n, pair in enumerate(pairs)} for side in (0, 1))
    kappa, common = cohen_kappa({**first, "alone": 1}, second)
    assert kappa == pytest.approx(0.4) and common == 50


def test_kappa_where_it_says_nothing() -> None:
    assert cohen_kappa({"x": 1}, {"y": 1}) == (None, 0)
    assert cohen_kappa({"x": 1, "y": 1}, {"x": 1, "y": 1}) == (None, 2)
    assert cohen_kappa({"x": 1, "y": 0}, {"x": 0, "y": 1}) == (-1.0, 2)
