"""How sure a mean is, and whether two systems differ: everything by prompt.

Pictures of one prompt are not independent, so a prompt counts once: its value is the mean of its pictures'. Intervals are
percentile bootstraps over prompts (Efron & Tibshirani 1993, chapter 13). Two systems are compared on the same prompts: a
paired bootstrap gives the interval of the difference, a sign-flip permutation test (Fisher 1935) its p, and the exact sign
test (Dixon & Mood 1946) counts who is better; of one 0/1 picture a prompt that is McNemar's exact test.

Limits: a percentile interval is a little narrow under some 30 prompts; and it speaks of other prompts of the same kind, not
of other weights or other raters. Nothing is corrected for many comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
_ROUNDING = 1e-12  # a mean of differences that cancel need not be 0, and would count as better or worse
_AT_ONCE = 4_000_000  # numbers drawn in one piece: bounds memory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None where one prompt alone was measured.

    Attributes:
        estimate: the mean over prompts.
        level: share of such intervals that hold the true mean.
        prompts: how many were measured.
    """

    estimate: float
    low: float | None
    high: float | None
    level: float
    prompts: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.estimate:.3f} (one prompt)"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        """The fields, for a results file."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on the same prompts.

    Attributes:
        difference: of the means, first less second.
        p_difference: two-sided, sign-flip permutation of the prompts' differences; exact where all flips are tried.
        better, worse, tied: prompts by the sign of their difference.
        p_sign: two-sided exact sign test over the prompts that are not tied.
    """

    difference: Interval
    p_difference: float
    better: int
    worse: int
    tied: int
    p_sign: float

    def to_json(self) -> dict[str, Any]:
        """The fields, for a results file."""
        return asdict(self)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `values` [N] and its interval; the same arguments give the same one.

    Where every value is 0, or every one 1, a bootstrap would give no width at all: then it is the exact binomial interval
    (Clopper & Pearson 1934) of as many trials as there are prompts.

    Args:
        values: one a picture.
        prompts: of each picture, which prompt it is of; None: each its own.
        level: in (0, 1).
        resamples: how often prompts are drawn anew.
        seed: of the draws.

    Raises:
        ValueError: there is no value, one is not finite, or `prompts` has another length.
    """
    means = prompt_means(values, prompts)
    _check(level, resamples)
    if len(means) > 1 and (np.all(means == 0.0) or np.all(means == 1.0)):
        exact = stats.binomtest(int(means.sum()), len(means)).proportion_ci(level, method="exact")
        low, high = float(exact.low), float(exact.high)
        return Interval(estimate=float(means[0]), low=low, high=high, level=level, prompts=len(means))
    return _bootstrapped(means, level, resamples, seed)


def statistic_interval(
    statistic: Callable[[np.ndarray], float],
    num_prompts: int,
    *,
    level: float = LEVEL,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The same of any statistic of a set of prompts (a median, a distance of distributions).

    Args:
        statistic: gives the figure of the prompts with these indices (int64 [num_prompts], some of them repeated).
        num_prompts: how many there are.

    Raises:
        ValueError: there is no prompt, or the figure of a draw is not finite.
    """
    _check(level, resamples)
    if num_prompts < 1:
        raise ValueError(f"num_prompts: {num_prompts}, at least 1 is needed")
    estimate = float(statistic(np.arange(num_prompts)))
    if num_prompts == 1:
        return Interval(estimate=estimate, low=None, high=None, level=level, prompts=1)
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(num_prompts, size=num_prompts)) for _ in range(resamples)])
    if not np.isfinite([estimate, *drawn]).all():
        raise ValueError("statistic: is not finite for some prompts")
    return _between(estimate, drawn, level, num_prompts)


def compare(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two systems: `first[i]` and `second[i]` are of the same prompt (and seed).

    Raises:
        ValueError: as of `mean_interval`, or the two have different lengths.
    """
    a, b = _numbers("first", first), _numbers("second", second)
    if len(a) != len(b):
        raise ValueError(f"second: {len(b)} values, the first has {len(a)}: they are compared one by one")
    _check(level, resamples)
    differences = prompt_means(a - b, prompts)
    differences[np.abs(differences) < _ROUNDING] = 0.0
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(
        difference=_bootstrapped(differences, level, resamples, seed),
        p_difference=_flipped(differences, resamples, seed),
        better=better,
        worse=worse,
        tied=len(differences) - better - worse,
        p_sign=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of the exact sign test; McNemar's exact test where these count the discordant pairs. 1 for none."""
    if better < 0 or worse < 0:
        raise ValueError(f"better, worse: {better}, {worse}: a count is not negative")
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def prompt_means(values: Sequence[float] | np.ndarray, prompts: Sequence[Hashable] | None = None) -> np.ndarray:
    """float64 [P]: the mean of each prompt's values, prompts in the order of their first value.

    Raises:
        ValueError: see `mean_interval`.
    """
    numbers = _numbers("values", values)
    if prompts is None:
        return numbers
    if len(prompts) != len(numbers):
        raise ValueError(f"prompts: {len(prompts)} for {len(numbers)} values")
    place: dict[Hashable, int] = {}
    rows = np.array([place.setdefault(prompt, len(place)) for prompt in prompts])
    return np.bincount(rows, numbers) / np.bincount(rows)


def _numbers(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name}: {list(numbers.shape)} is not a list of at least one number")
    broken = np.flatnonzero(~np.isfinite(numbers))
    if len(broken):
        raise ValueError(f"{name}[{broken[0]}]: {numbers[broken[0]]} is not finite")
    return numbers


def _check(level: float, resamples: int) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: {level} is not between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples: {resamples}, at least 1 is needed")


def _bootstrapped(means: np.ndarray, level: float, resamples: int, seed: int) -> Interval:
    estimate, count = float(means.mean()), len(means)
    if count == 1:
        return Interval(estimate=estimate, low=None, high=None, level=level, prompts=1)
    rng, at_once = np.random.default_rng(seed), max(1, _AT_ONCE // count)
    drawn = [
        means[rng.integers(count, size=(min(at_once, resamples - done), count))].mean(1)
        for done in range(0, resamples, at_once)
    ]
    return _between(estimate, np.concatenate(drawn), level, count)


def _between(estimate: float, drawn: np.ndarray, level: float, prompts: int) -> Interval:
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level, prompts=prompts)


def _flipped(differences: np.ndarray, resamples: int, seed: int) -> float:
    """Were the systems alike, each prompt's difference could as well have the other sign."""
    told = differences[differences != 0.0]  # flipping nothing changes nothing
    if len(told) < 2:
        return 1.0
    tested = stats.permutation_test(
        (told,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // len(told)),
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)
