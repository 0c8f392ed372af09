"""What admission counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from generator_svc.waiting_line import Priority

_WAIT_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
REFUSALS = ("queue_full", "deadline_too_short", "deadline_passed", "draining")


class AdmissionMetrics:
    """Who waits, who is drawn, who was refused and why. All labels are there from the start, at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.depth = Gauge(
            "reimagen_generator_queue_depth", "Requests that wait for their turn.", ("priority",), registry=registry
        )
        self.in_flight = Gauge(
            "reimagen_generator_in_flight_requests", "Requests that are being drawn.", ("priority",), registry=registry
        )
        self.capacity = Gauge(
            "reimagen_generator_admission_capacity", "Requests that may be drawn at once.", registry=registry
        )
        self.waiting_work_s = Gauge(
            "reimagen_generator_queue_work_seconds", "Estimated work of the requests that wait.", registry=registry
        )
        self.wait_s = Histogram(
            "reimagen_generator_queue_wait_seconds",
            "Time from a request's arrival until its drawing began.",
            ("priority",),
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        self.refused = Counter(
            "reimagen_generator_refused", "Requests that were not drawn, by reason.", ("reason",), registry=registry
        )
        self.abandoned = Counter(
            "reimagen_generator_abandoned", "Requests whose callers went away while they waited.", registry=registry
        )
        for priority in Priority:
            for metric in (self.depth, self.in_flight, self.wait_s):
                metric.labels(priority.name.lower())
        for reason in REFUSALS:
            self.refused.labels(reason)
