"""Intervals and tests by prompt, against SciPy, against counting by hand, and against what is known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from evaluation.scores.intervals import compare, mean_interval, prompt_means, sign_test, statistic_interval

RNG = np.random.default_rng(11)


def test_the_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    values = RNG.gamma(2.0, size=80)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=3).confidence_interval
    ours = mean_interval(values, resamples=20_000)
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01) and ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours.prompts == 80
    assert mean_interval(values, resamples=20_000) == ours, "seeded"
    assert mean_interval(values, resamples=20_000, seed=1) != ours


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    found = [mean_interval(RNG.normal(5.0, 2.0, size=100), resamples=500, seed=i) for i in range(300)]
    held = sum(f.low is not None and f.high is not None and f.low <= 5.0 <= f.high for f in found)
    assert 0.90 <= held / 300 <= 0.99


def test_pictures_of_one_prompt_count_as_one() -> None:
    once = RNG.normal(size=30)
    four_times, prompts = np.repeat(once, 4), np.repeat(np.arange(30), 4)
    by_prompt = mean_interval(four_times, [f"prompt {p}" for p in prompts])
    alone = mean_interval(four_times)
    assert by_prompt == mean_interval(once), "four equal pictures tell no more than one"
    assert by_prompt.low is not None and alone.low is not None and alone.low > by_prompt.low
    assert prompt_means([1.0, 5.0, 3.0], ["b", "a", "b"]).tolist() == [2.0, 5.0]


def test_never_is_not_sure() -> None:
    """None of twenty: the bootstrap would say 0 to 0; 3 / n is the known rule of thumb."""
    none = mean_interval(np.zeros(20))
    assert none.low == 0.0 and none.high == pytest.approx(1.0 - 0.025 ** (1 / 20))
    every = mean_interval(np.ones(20), level=0.9)
    assert every.high == 1.0 and every.low == pytest.approx(0.05 ** (1 / 20))
    one = mean_interval([1.0])
    assert (one.low, one.high) == (None, None) and "one prompt" in str(one)
    assert json.loads(json.dumps(one.to_json())) == one.to_json()


def test_a_statistic_of_ones_own() -> None:
    values = RNG.normal(size=60)
    median = statistic_interval(lambda rows: float(np.median(values[rows])), 60, resamples=4000)
    theirs = stats.bootstrap((values,), np.median, method="percentile", n_resamples=4000, rng=3).confidence_interval
    assert median.estimate == np.median(values)
    assert median.low == pytest.approx(theirs.low, abs=0.08) and median.high == pytest.approx(theirs.high, abs=0.08)
    assert statistic_interval(lambda rows: 1.0, 1).low is None


def test_the_sign_test_counts_coins() -> None:
    def by_hand(better: int, worse: int) -> float:
        total, few = better + worse, min(better, worse)
        return min(1.0, 2.0 * sum(math.comb(total, i) for i in range(few + 1)) / 2**total)

    for better, worse in ((0, 0), (1, 0), (5, 0), (3, 7), (6, 6), (40, 22)):
        assert sign_test(better, worse) == pytest.approx(by_hand(better, worse))


def test_few_differences_are_flipped_in_every_way() -> None:
    first, second = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]), np.array([2.0, 2.0, 1.0, 1.0, 2.0, 3.0])
    told = [d for d in first - second if d]
    flips = [abs(np.dot(signs, told)) for signs in itertools.product((1, -1), repeat=len(told))]
    found = compare(first, second)
    assert found.p_difference == pytest.approx(np.mean(np.array(flips) >= abs(sum(told)) - 1e-12))
    assert (found.better, found.worse, found.tied) == (4, 1, 1)
    assert found.p_sign == sign_test(4, 1)
    assert found.difference.estimate == pytest.approx(np.mean(first - second))


def test_two_systems_that_differ_and_two_that_do_not() -> None:
    hard = RNG.normal(size=200)  # some prompts are harder than others, for both
    first, second = hard + RNG.normal(0.3, 0.5, 200), hard + RNG.normal(0.0, 0.5, 200)
    found = compare(first, second)
    assert found.p_difference < 0.001 and found.p_sign < 0.01
    assert found.difference.low is not None and found.difference.low > 0.0
    _, unpaired = stats.ttest_ind(first, second)
    assert np.asarray(unpaired) > 0.001, "unpaired, the prompts would hide it"
    assert compare(first, second) == found
    turned = compare(second, first)
    assert turned.p_sign == found.p_sign and turned.better == found.worse
    assert turned.difference.estimate == -found.difference.estimate
    p = [compare(x[:30], x[30:], resamples=200, seed=i).p_difference for i, x in enumerate(RNG.normal(size=(150, 60)))]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10, "alike: one in twenty is called different"


def test_differences_that_cancel_are_ties() -> None:
    first, second = [0.1, 0.2, 0.0, 1.0], [0.0, 0.0, 0.3, 0.0]
    assert sum(a - b for a, b in zip(first[:3], second[:3], strict=True)) != 0.0, "rounding alone"
    found = compare(first, second, ["a", "a", "a", "b"])
    assert (found.better, found.worse, found.tied) == (1, 0, 1)


def test_two_prompts_prove_nothing() -> None:
    found = compare([1.0, 1.0], [0.0, 0.0])
    assert found.p_difference == 0.5 and found.p_sign == 0.5
    assert compare([1.0], [0.0]).p_difference == 1.0 and compare([1.0, 1.0], [1.0, 1.0]).p_sign == 1.0


@pytest.mark.parametrize(
    ("values", "prompts", "said"),
    [
        ([], None, "values"),
        ([1.0, math.nan], None, r"values\[1\]: nan"),
        ([1.0, math.inf], None, r"values\[1\]: inf"),
        ([[1.0]], None, r"values: \[1, 1\]"),
        ([1.0, 2.0], ["a"], "prompts: 1 for 2"),
    ],
)
def test_what_is_no_measurement_is_refused(values: list, prompts: list | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mean_interval(values, prompts)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="second: 1 values, the first has 2"):
        compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"second\[0\]: nan"):
        compare([1.0], [math.nan])
    with pytest.raises(ValueError, match="statistic: is not finite"):
        statistic_interval(lambda rows: math.nan if 0 in rows else 1.0, 3)
    with pytest.raises(ValueError, match="level: 95"):
        mean_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="resamples: 0"):
        compare([1.0], [1.0], resamples=0)
