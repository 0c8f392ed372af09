"""Ten times more requests than the generator can carry out: what becomes of them, how soon, and at whose cost.

Callers, generator and stages share the machine's cores here. What each takes of them is told beside the goodput: in
production the callers are elsewhere.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import time
import urllib.request
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import grpc.aio
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.load import processor_s
from bench.serving_service import PEAK_DEADLINE_S, Outcome, Served, ask, request_of

OVERLOAD = 10
_DECISION = "reimagen_generator_decision_seconds_bucket"
_BEGUN = "reimagen_generator_queue_wait_seconds_count"
_DRAWN = "reimagen_generator_pictures_total"
_REFUSED = "reimagen_generator_refused_total"
_AFTER_WAITING = ("deadline_passed", "deadline_given_up")
_WAITED = (
    "waited until",
    "left before stage",
    "deadline has passed",
)  # how the service says that it gave up after waiting
_LATE_S = 0.1  # before its deadline: the call itself ended it

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by name and sorted labels."""


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """What had been counted, and what processor time had been taken, at a moment."""

    at_s: float
    samples: Samples
    callers_s: float
    generator_s: float
    triton_s: float


def overloaded(
    served: Served, *, stop_at: int, callers: int, seconds: float, triton_pid: int | None = None
) -> dict[str, Any]:
    """Goodput at its peak (closed loop), then under `OVERLOAD` times that many requests a second (open loop).

    Nobody asks again who has been refused: that, too, would be load beyond the ten times.
    """
    return asyncio.run(_overloaded(served, stop_at, callers, seconds, triton_pid))


async def _overloaded(
    served: Served, stop_at: int, callers: int, seconds: float, triton_pid: int | None
) -> dict[str, Any]:
    requests = [request_of(stop_at=stop_at, seed=seed) for seed in range(32)]
    async with grpc.aio.insecure_channel(served.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        peak, at_peak = await _peak(served, channel, requests, callers, seconds, triton_pid)
        latencies = sorted(outcome.seconds for outcome in peak if outcome.code == "OK")
        peak_rate = len(latencies) / seconds
        deadline_s = 3.0 * latencies[len(latencies) // 2]
        began = _moment(served, triton_pid)
        loaded = await _open(channel, requests, OVERLOAD * peak_rate, deadline_s + seconds, deadline_s)
        ended = _moment(served, triton_pid)
    by_reason = {reason: more for reason, more in _by_label(began, ended, _REFUSED, "reason").items() if more}
    # Until the first deadlines have passed the line is still filling, and after the last arrival it runs dry.
    steady = [outcome for outcome in loaded if deadline_s <= outcome.ended_s <= deadline_s + seconds]
    good = [outcome.seconds for outcome in steady if outcome.code == "OK"]
    missed = [outcome for outcome in steady if outcome.code != "OK" and outcome.seconds > deadline_s - _LATE_S]
    # Those that are given up after they have waited are refused, too, but not at once.
    late = round(sum(by_reason.get(reason, 0.0) for reason in _AFTER_WAITING))
    ended_early = [outcome for outcome in loaded if outcome.code != "OK" and outcome.seconds <= deadline_s - _LATE_S]
    refused = [outcome.seconds for outcome in ended_early if not any(words in outcome.said for words in _WAITED)]
    rate = len(good) / seconds
    return {
        "goodput_at_10x": round(rate / peak_rate, 4),
        "peak_per_s": round(peak_rate, 3),
        "peak_callers": callers,
        "overload_per_s": round(len(loaded) / (deadline_s + seconds), 2),
        "goodput_per_s": round(rate, 3),
        "deadline_s": round(deadline_s, 2),
        "ended": dict(collections.Counter(outcome.code for outcome in steady)),
        "ended_at_their_deadline": len(missed),
        "given_up_after_waiting": late,
        "begun_in_vain": round(_grown(began, ended, _BEGUN) - _grown(began, ended, _DRAWN)),
        "refused_by_reason": by_reason,
        **{f"refused_at_once_p{p}_ms": _percentile(refused, p, 1e3) for p in (50, 90, 99)},
        **{f"decided_p{p}_ms": _decided(began, ended, p) for p in (50, 99)},
        **{f"accepted_p{p}_s": _percentile(good, p, 1.0) for p in (50, 99)},
        "cores_at_peak": at_peak,
        "cores_under_overload": _costs(began, ended),
    }


def _percentile(seconds: list[float], percent: int, scale: float) -> float | None:
    return round(float(np.percentile(seconds, percent)) * scale, 2) if seconds else None


def _decided(began: _Moment, ended: _Moment, percent: int) -> float | None:
    """A percentile of the service's own time to refuse, in ms, as Prometheus would have it: linear within a bucket."""
    found = _by_label(began, ended, _DECISION, "le", outcome="refused")
    counts = sorted((float(bound), count) for bound, count in found.items())
    if not counts or not counts[-1][1]:
        return None
    wanted = counts[-1][1] * percent / 100
    for (low, below), (high, up_to) in pairwise([(0.0, 0.0), *counts]):
        if up_to >= wanted:
            return round(
                (low if high == float("inf") else low + (high - low) * (wanted - below) / (up_to - below)) * 1e3, 2
            )
    raise AssertionError("the last bucket holds everything")


def _by_label(began: _Moment, ended: _Moment, name: str, label: str, **where: str) -> dict[str, float]:
    """By how much the series of `name` have grown, by one of their labels."""
    grown: dict[str, float] = {}
    for (each, labels), value in ended.samples.items():
        told = dict(labels)
        if each == name and where.items() <= told.items():
            grown[told[label]] = value - began.samples.get((each, labels), 0.0)
    return grown


def _grown(began: _Moment, ended: _Moment, name: str) -> float:
    return sum(value - began.samples.get(key, 0.0) for key, value in ended.samples.items() if key[0] == name)


def _moment(served: Served, triton_pid: int | None) -> _Moment:
    with urllib.request.urlopen(served.metrics_url, timeout=10.0) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}
    return _Moment(
        at_s=time.perf_counter(),
        samples=samples,
        callers_s=time.process_time(),
        generator_s=processor_s(served.pid),
        triton_s=processor_s(triton_pid) if triton_pid else 0.0,
    )


def _costs(began: _Moment, ended: _Moment) -> dict[str, float]:
    """Cores that each took, the mean."""
    passed_s = ended.at_s - began.at_s
    cores = {"callers": 0.0, "generator": 0.0, "triton": 0.0, "of": float(os.cpu_count() or 1)}
    for name in ("callers", "generator", "triton"):
        cores[name] = round((getattr(ended, f"{name}_s") - getattr(began, f"{name}_s")) / passed_s, 3)
    return cores


async def _peak(
    served: Served, channel: grpc.aio.Channel, requests: list[bytes], callers: int, seconds: float, pid: int | None
) -> tuple[list[Outcome], dict[str, float]]:
    """What ends within `seconds` where each caller asks again as soon as it is answered, and what it costs.

    They have asked for a sixth of that before, and go on until the time is over: a window that began with the first
    requests, or that lacked those under way at its end, would be too short for its pictures.
    """
    warm_s, started, ended = seconds / 6, time.perf_counter(), list[Outcome]()
    over = asyncio.Event()

    async def call(number: int) -> None:
        while not over.is_set():
            outcome = await ask(channel, requests[number % len(requests)], deadline_s=PEAK_DEADLINE_S)
            ended.append(replace(outcome, ended_s=time.perf_counter() - started))
            number += callers

    calls = [asyncio.create_task(call(number)) for number in range(callers)]
    await asyncio.sleep(warm_s)
    began = _moment(served, pid)
    await asyncio.sleep(max(0.0, warm_s + seconds - (time.perf_counter() - started)))
    costs = _costs(began, _moment(served, pid))
    over.set()
    await asyncio.gather(*calls)
    return [outcome for outcome in ended if warm_s <= outcome.ended_s <= warm_s + seconds], costs


async def _open(
    channel: grpc.aio.Channel, requests: list[bytes], rate: float, seconds: float, deadline_s: float
) -> list[Outcome]:
    """Requests at random moments for so long, `rate` a second whatever becomes of them."""
    source, calls = random.Random(5), []
    started = time.perf_counter()
    at, number = 0.0, 0

    async def call(request: bytes) -> Outcome:
        outcome = await ask(channel, request, deadline_s=deadline_s)
        return replace(outcome, ended_s=time.perf_counter() - started)

    while at < seconds:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - started)))
        calls.append(asyncio.create_task(call(requests[number % len(requests)])))
        number += 1
        at += source.expovariate(rate)
    return await asyncio.gather(*calls)
