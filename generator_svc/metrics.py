"""What generation counts beside its calls, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.service.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServiceError,
)
from generator_svc.call import Call
from generator_svc.waiting_line import Priority

_STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_REQUEST_BUCKETS_S = (0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300)
_PREVIEW_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SLOWDOWN_BUCKETS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
OUTCOMES = ("ok", "rejected", "too_short", "deadline", "cancelled", "invalid", "error")
NO_NEIGHBORS, ONE_LEG = "no_neighbors", "one_leg"
_NO_PICTURE = "none"  # resolution of an order that was turned away before its stages were known


class GeneratorMetrics:
    """Steps and stages: their time, how full their batches are, what they keep; pictures drawn."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step_s = Histogram(
            "reimagen_generator_step_duration_seconds",
            "Time of one step of a batch.",
            ("stage",),
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self.batch = Histogram(
            "reimagen_generator_step_batch_size",
            "Trajectories that shared a step.",
            ("stage",),
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.stage_s = Histogram(
            "reimagen_generator_stage_duration_seconds",
            "Time that an order's pictures spent in a stage, waiting included.",
            ("stage",),
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        self.taken_bytes = Gauge(
            "reimagen_generator_taken_bytes",
            "Bytes that the admitted orders keep, or will keep.",
            ("stage",),
            registry=registry,
        )
        self.pictures = Counter(
            "reimagen_generator_pictures", "Pictures finished, by their side.", ("size",), registry=registry
        )
        self.degraded = Counter(
            "reimagen_generator_degraded",
            "Orders drawn with less than retrieval should give: without neighbors, or with those of one leg alone.",
            ("reason",),
            registry=registry,
        )
        self.requests = Counter(
            "reimagen_generator_requests",
            "Orders that have ended, by how.",
            ("outcome", "priority"),
            registry=registry,
        )
        self.request_s = Histogram(
            "reimagen_generator_request_duration_seconds",
            "Time from an order's arrival to its last event, waiting included.",
            ("outcome", "resolution"),
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.preview_s = Histogram(
            "reimagen_generator_time_to_first_preview_seconds",
            "Time from an order's arrival to its first preview, of orders that ask for previews.",
            buckets=_PREVIEW_BUCKETS_S,
            registry=registry,
        )
        self.slowdown = Histogram(
            "reimagen_generator_request_slowdown_ratio",
            "Time of an order that was drawn, waiting included, over what it was estimated to take with nobody beside it.",
            buckets=_SLOWDOWN_BUCKETS,
            registry=registry,
        )
        for reason in (NO_NEIGHBORS, ONE_LEG):
            self.degraded.labels(reason)
        for outcome in OUTCOMES:
            for priority in Priority:
                self.requests.labels(outcome, priority.name.lower())

    @contextmanager
    def order(self, priority: str, call: Call) -> Iterator[OrderClock]:
        """The time of an order, and how it ends; the block tells the clock what it learns of it."""
        clock = OrderClock(metrics=self)
        outcome = "ok"
        try:
            yield clock
        except BaseException as error:
            outcome = outcome_of(error, call)
            raise
        finally:
            elapsed_s = clock.elapsed_s()
            self.requests.labels(outcome, priority).inc()
            self.request_s.labels(outcome, str(clock.resolution or _NO_PICTURE)).observe(elapsed_s)
            if outcome == "ok" and clock.alone_s > 0.0:
                self.slowdown.observe(elapsed_s / clock.alone_s)


@dataclass(kw_only=True)
class OrderClock:
    """One order under way.

    Attributes:
        resolution: side of the pictures that it asks for; 0: not known yet.
        alone_s: what it is estimated to take with nobody beside it; 0: not known.
    """

    metrics: GeneratorMetrics
    resolution: int = 0
    alone_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _has_preview: bool = False

    def elapsed_s(self) -> float:
        """Since the order's arrival."""
        return time.perf_counter() - self._began

    def previewed(self) -> None:
        """A preview is told; the first one counts."""
        if not self._has_preview:
            self._has_preview = True
            self.metrics.preview_s.observe(self.elapsed_s())


def outcome_of(error: BaseException, call: Call) -> str:
    """How an order has ended that failed: one of `OUTCOMES`."""
    match error:
        case asyncio.CancelledError() | GeneratorExit():
            remaining_s = call.time_remaining_s()
            return "cancelled" if remaining_s is None or remaining_s > 0 else "deadline"
        case DeadlineExceeded():
            return "too_short" if error.reason == "DEADLINE_TOO_SHORT" else "deadline"
        case ResourceExhausted():
            return "rejected"
        case InvalidArgument() | NotFound() | FailedPrecondition():
            return "invalid"
        case ServiceError() if error.reason == "DRAINING":
            return "rejected"
        case _:
            return "error"
