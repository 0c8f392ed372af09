"""How many Tritons keep up: a measured curve of shared batches, arrivals, and a deadline.

A replica that draws n pictures at once finishes X(n) of them a second, as measured, each getting an equal share: they go step
by step in one batch. The pictures that it does not take at once wait in line, first come first served. Arrivals are Poisson
and are dealt among replicas at random, which is worse than what a generator does: the plan errs to the safe side.
The work of a picture is always the same, so neither M/M/c nor M/D/c is this queue; it is simulated, event by event. Where a
closed form exists, a test compares: M/D/1 (Pollaczek-Khinchine) for one slot, the product form of symmetric queues (Kelly 1979,
theorem 3.8, which holds for every distribution of work) for enough slots.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Pictures a second of one replica, by how many it draws at once.

    Attributes:
        pictures_per_s: entry n - 1 for n at once; the last entry is `slots` at once, more wait.
    """

    pictures_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no curve."""
        if not self.pictures_per_s or not all(math.isfinite(rate) and rate > 0 for rate in self.pictures_per_s):
            raise ValueError(f"curve: {self.pictures_per_s} is not all positive")

    @property
    def slots(self) -> int:
        """How many are drawn at once."""
        return len(self.pictures_per_s)

    @property
    def peak(self) -> float:
        """Pictures a second with all slots taken, which no arrivals may exceed for long."""
        return self.pictures_per_s[-1]


def read_curve(path: Path, kind: str, *, slots: int, scale: float = 1.0) -> Curve:
    """The curve of `kind` (triton, embedded) in a result of `make bench-serving`; between two measured points it is a line.

    Args:
        slots: of a replica (REIMAGEN_GENERATOR_SLOTS); beyond the last measured point the rate is that point's.
        scale: rates are this many times those measured: 0.3 where your pictures take 1 / 0.3 of the time of one at a time.

    Raises:
        ValueError: the file has no such curve, or a number is out of its range.
    """
    if slots < 1 or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"slots, scale: {slots}, {scale} are not positive")
    try:
        measured: Mapping[str, Mapping[str, float]] = json.loads(path.read_text())[kind]["callers"]
        points = sorted((int(callers), figures["pictures_per_s"]) for callers, figures in measured.items())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"curve: {path} has no {kind!r} with callers and pictures_per_s ({error!r})") from None
    callers, rates = zip(*points, strict=True)
    return Curve(pictures_per_s=tuple(scale * np.interp(range(1, slots + 1), callers, rates)))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a replica does under load.

    Attributes:
        replicas: the arrivals are dealt among so many.
        load: of the peak rate.
        mean_s, p95_s: from a picture's arrival to its end.
        in_time: share that ends within the deadline.
    """

    replicas: int
    load: float
    mean_s: float
    p95_s: float
    in_time: float


def latencies(curve: Curve, arrivals_per_s: float, *, pictures: int, seed: int = 0) -> np.ndarray:
    """Seconds from arrival to end of `pictures` pictures at one replica that began empty; the first tenth is left out. [P]

    With n in service each picture's work, 1, shrinks by X(n) / n a second. All work is equal, so who came into service first
    ends first: one clock of work done by each, and the ends in order.
    """
    rng = np.random.default_rng(seed)
    came = np.cumsum(rng.exponential(1.0 / arrivals_per_s, pictures))
    ended, waiting, serving = np.zeros(pictures), deque[int](), deque[tuple[int, float]]()
    now = attained = 0.0  # attained: work that a picture would have got, had it been in service from the start
    upcoming = done = 0
    while done < pictures:
        each = curve.pictures_per_s[len(serving) - 1] / len(serving) if serving else 0.0
        ends = now + (serving[0][1] - attained) / each if serving else math.inf
        comes = came[upcoming] if upcoming < pictures else math.inf
        attained += each * (min(ends, comes) - now)
        now = min(ends, comes)
        if ends <= comes:
            picture, attained = serving.popleft()  # exactly what it needed
            ended[picture] = now
            done += 1
        else:
            waiting.append(upcoming)
            upcoming += 1
        while waiting and len(serving) < curve.slots:
            serving.append((waiting.popleft(), attained + 1.0))
    return (ended - came)[pictures // 10 :]


def outcome(
    curve: Curve, arrivals_per_s: float, deadline_s: float, replicas: int, *, pictures: int = 40_000
) -> Outcome:
    """What each of `replicas` does with its share of the arrivals; all late where they exceed the peak."""
    each = arrivals_per_s / replicas
    if each >= curve.peak:
        return Outcome(replicas=replicas, load=each / curve.peak, mean_s=math.inf, p95_s=math.inf, in_time=0.0)
    took = latencies(curve, each, pictures=pictures)
    return Outcome(
        replicas=replicas,
        load=each / curve.peak,
        mean_s=float(took.mean()),
        p95_s=float(np.quantile(took, 0.95)),
        in_time=float((took <= deadline_s).mean()),
    )


def plan(
    curve: Curve, arrivals_per_s: float, deadline_s: float, *, share: float, most: int = 1000
) -> Sequence[Outcome]:
    """The fewest replicas that end `share` of all pictures in time, last, with what fewer do (at most three) before it.

    Raises:
        ValueError: a number is out of its range, or no number of replicas is enough: one picture alone takes too long.
    """
    if not (math.isfinite(arrivals_per_s) and arrivals_per_s > 0 and math.isfinite(deadline_s) and deadline_s > 0):
        raise ValueError(f"arrivals, deadline: {arrivals_per_s}, {deadline_s} are not positive")
    if not 0 < share < 1:
        raise ValueError(f"share: {share} is not between 0 and 1")
    if 1.0 / curve.pictures_per_s[0] > deadline_s:
        raise ValueError(
            f"deadline: a picture alone takes {1.0 / curve.pictures_per_s[0]:.3g} s, more than {deadline_s:g} s"
        )
    least = max(1, math.ceil(arrivals_per_s / curve.peak))
    tried: list[Outcome] = []
    for replicas in range(least, least + most):
        tried.append(outcome(curve, arrivals_per_s, deadline_s, replicas))
        if tried[-1].in_time >= share:
            return tried[-4:]
    raise ValueError(f"deadline: {least + most - 1} replicas end less than {share:g} within {deadline_s:g} s")


def mean_of_symmetric_queue(curve: Curve, arrivals_per_s: float, *, states: int = 10_000) -> float:
    """Mean seconds where nothing waits: P(n) is as the product of arrivals / X(i), i up to n (Kelly 1979, theorem 3.8)."""
    rates = np.concatenate([curve.pictures_per_s, np.full(states, curve.peak)])[:states]
    logs = np.concatenate([[0.0], np.cumsum(np.log(arrivals_per_s / rates))])
    chances = np.exp(logs - logs.max())
    chances /= chances.sum()
    return float(chances @ np.arange(states + 1)) / arrivals_per_s
