"""A soak: a stack, callers of every kind, faults; and what must be true at the end."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.soak.calls import ASKED, Callers, Outcome
from tests.soak.faults import Fault, Struck, all_pictures, inflict, schedule
from tests.soak.stack import SoakStack, kill, wait_until
from tests.soak.watching import Growth, HealthWatch, MemoryWatch

SETTLED_S = 60.0
DRAINED_S = 60.0
_LIVE = {
    "generator": (
        "reimagen_generator_in_flight_requests",
        "reimagen_generator_queue_depth",
        "reimagen_generator_triton_in_flight",
    ),
    "triton": ("reimagen_stage_live_requests", "reimagen_stage_live_bytes"),
}


@dataclass(frozen=True, kw_only=True)
class SoakSettings:
    """How long, and how hard.

    Attributes:
        seconds: of everything; longer where the last fault ends so late that less than `calm_s` would be left.
        faulty_s: in which things are killed.
        warm_up_s: from then until memory is measured.
        calm_s: at least so long nothing is killed at the end.
        num_callers: at once.
        faults: what breaks first, in this order; then it is drawn.
    """

    seed: int
    seconds: float
    faulty_s: float
    warm_up_s: float = 0.0
    calm_s: float = 0.0
    num_callers: int
    faults: tuple[Fault, ...] = ()


@dataclass
class Report:
    """What came of it."""

    outcomes: list[Outcome] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    hanging: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    live: dict[str, float] = field(default_factory=dict)

    def unexplained(self) -> list[str]:
        """Calls that ended as none should."""
        outages = [(struck.at, struck.back) for struck in self.struck]
        said = ((outcome, outcome.unexplained(outages)) for outcome in self.outcomes)
        return [f"{outcome.kind}: {why}" for outcome, why in said if why]

    def __str__(self) -> str:
        counts = Counter((outcome.kind, outcome.code) for outcome in self.outcomes)
        drawn = [outcome for outcome in self.outcomes if outcome.difference is not None]
        lines = [f"{kind:10} {code:18} {count:6}" for (kind, code), count in sorted(counts.items())]
        same = sum(outcome.is_same for outcome in drawn)
        equal = sum(outcome.difference == 0 for outcome in drawn)
        largest = max((outcome.difference or 0 for outcome in drawn), default=0)
        lines.append(
            f"{len(drawn)} drawn: {same} the same bytes, {equal} the same pixels, the rest within {largest}/255"
        )
        lines += [str(struck) for struck in self.struck]
        lines += [
            f"{g.name:14} {g.mib:5.0f} MiB, at most {g.peak_mib:.0f}, {g.mib_a_minute:+.2f} a minute over {g.seconds:.0f} s"
            for g in self.growths
        ]
        return "\n".join([*lines, *(f"unexplained: {why}" for why in self.unexplained())])


@contextmanager
def _watched(stack: SoakStack) -> Iterator[tuple[dict[str, HealthWatch], MemoryWatch]]:
    watches = {name: HealthWatch(stack.address(name)) for name in ("generator", "retrieval", "triton")}
    memory = MemoryWatch(stack)
    try:
        yield watches, memory
    finally:
        memory.close()
        for watch in watches.values():
            watch.close()


def soak(stack: SoakStack, settings: SoakSettings) -> Report:
    """Call, and break things, for as long as is set; then wait until the stack is at rest."""
    rng, report = random.Random(settings.seed), Report()
    callers = Callers(stack.address("generator"), rng)
    report.outcomes = callers.outcomes
    callers.expect([*ASKED, *all_pictures()])
    with _watched(stack) as (watches, memory):
        started = time.monotonic()
        callers.start(settings.num_callers)
        faults = schedule(rng)
        first = iter(settings.faults)
        try:
            while (planned := next(first, None)) or time.monotonic() - started < settings.faulty_s:
                report.struck.append(inflict(planned or next(faults), stack, callers, watches))
                print(report.struck[-1], flush=True)
            calm = time.monotonic()
            time.sleep(max(settings.calm_s, started + settings.seconds - calm))
            report.growths = memory.growths(since=calm + settings.warm_up_s)
        finally:
            report.hanging = callers.stop()
            callers.close()
        report.live = at_rest(stack)
        report.leftovers = stack.leftovers()
    return report


def at_rest(stack: SoakStack) -> dict[str, float]:
    """What still lives in any stage, in the line, or at a Triton, once that has had time to end."""
    live: dict[str, float] = {}
    give_up = time.monotonic() + SETTLED_S
    while time.monotonic() < give_up:
        live = {
            f"{name} {labels}": value
            for program, names in _LIVE.items()
            for name in names
            for labels, value in stack.figures(program, name).items()
        }
        assert live, "nothing is told of what lives"
        live = {name: value for name, value in live.items() if value}
        if not live:
            break
        time.sleep(0.5)
    return live


def drain(stack: SoakStack, num_calls: int) -> list[Outcome]:
    """SIGTERM to the generator while it draws; gives how the calls ended that it had accepted."""
    callers = Callers(stack.address("generator"), random.Random(0))
    callers.expect(ASKED)
    accepted = threading.Semaphore(0)
    threads = [
        threading.Thread(
            target=callers.draw,
            args=("ok", ASKED[number % len(ASKED)]),
            kwargs={"patient": False, "on_event": lambda event: accepted.release()},
        )
        for number in range(num_calls)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert accepted.acquire(timeout=DRAINED_S)
    before = stack.pid("generator")
    kill(before, signal.SIGTERM)
    for thread in threads:
        thread.join(DRAINED_S)
    assert not any(thread.is_alive() for thread in threads)
    wait_until(lambda: stack.pid("generator") not in (0, before), DRAINED_S, "the generator's restart")
    callers.close()
    return [outcome for outcome in callers.outcomes if outcome.is_accepted]
