"""What is observed all along, on threads of their own: health, and the memory of every process."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.soak.stack import Process, SoakStack, resident_mib

HEALTH_EVERY_S = 0.1
MEMORY_EVERY_S = 1.0
_CHECK_S = 5.0
_SOON = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))


class HealthWatch:
    """Asks one server whether it serves, ten times a second; keeps when that changed."""

    def __init__(self, address: str) -> None:
        """Begin."""
        self._channel = grpc.insecure_channel(address, options=_SOON)
        self._changes: list[tuple[float, bool]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        health, request = health_pb2_grpc.HealthStub(self._channel), health_pb2.HealthCheckRequest()
        while not self._over.wait(HEALTH_EVERY_S):
            asked = time.monotonic()
            try:
                serving = health.Check(request, timeout=_CHECK_S).status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError:
                serving = False
            if not self._changes or self._changes[-1][1] != serving:
                self._changes.append((asked, serving))

    def when(self, serving: bool, *, after: float) -> float | None:
        """The first moment after one at which it serves, or does not; None: not so far."""
        before = [told for told in self._changes if told[0] <= after]
        if before and before[-1][1] == serving:
            return after
        return next((at for at, told in self._changes if at > after and told == serving), None)

    def close(self) -> None:
        """End."""
        self._over.set()
        self._thread.join(_CHECK_S + 1)
        self._channel.close()


@dataclass(frozen=True)
class Growth:
    """Memory of one process over a time (MiB): its floor at the end, how that grew a minute, and the highest it came.

    The floor is the least of each tenth of the time: what requests take for a while comes and goes above it.
    """

    name: str
    mib: float
    mib_a_minute: float
    peak_mib: float
    seconds: float

    @property
    def share(self) -> float:
        """By which part of itself the floor grew over the whole time."""
        return self.mib_a_minute * self.seconds / 60 / self.mib


class MemoryWatch:
    """The memory of every process of a stack, once a second."""

    def __init__(self, stack: SoakStack) -> None:
        """Begin."""
        self._stack = stack
        self._samples: dict[Process, list[tuple[float, float]]] = defaultdict(list)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(MEMORY_EVERY_S):
            now = time.monotonic()
            for process in self._stack.processes():
                if mib := resident_mib(process.pid):
                    self._samples[process].append((now, mib))

    def growths(self, *, since: float) -> list[Growth]:
        """Of the processes that lived from `since` on until now."""
        found: list[Growth] = []
        for process in self._stack.processes():
            samples = [sample for sample in self._samples[process] if sample[0] >= since]
            if len(samples) > 1 and self._samples[process][0][0] <= since + 2 * MEMORY_EVERY_S:
                floor = floors(samples)
                seconds = samples[-1][0] - samples[0][0]
                peak = max(mib for _, mib in samples)
                found.append(Growth(process.name, floor[-1][1], 60 * slope(floor), peak, seconds))
        return found

    def close(self) -> None:
        """End."""
        self._over.set()
        self._thread.join(60)


def floors(samples: list[tuple[float, float]], count: int = 10) -> list[tuple[float, float]]:
    """The lowest sample of each of so many parts of the time."""
    size = max(1, len(samples) // count)
    parts = (samples[at : at + size] for at in range(0, len(samples), size))
    return [min(part, key=lambda sample: sample[1]) for part in parts]


def slope(samples: list[tuple[float, float]]) -> float:
    """Per second, by Theil and Sen: the median over all pairs, which one jump does not move."""
    pairs = combinations(samples, 2)
    return statistics.median((y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs)
