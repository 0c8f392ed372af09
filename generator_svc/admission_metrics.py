"""What admission counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from generator_svc.waiting_line import Priority

_WAIT_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DECISION_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.5)
REFUSALS = ("queue_full", "deadline_too_short", "deadline_passed", "deadline_given_up", "draining")


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
        self.decision_s = Histogram(
            "reimagen_generator_decision_seconds",
            "Time from a request's arrival until it was let in or refused.",
            ("outcome",),
            buckets=_DECISION_BUCKETS_S,
            registry=registry,
        )
        self.margin = Gauge(
            "reimagen_generator_forecast_margin_ratio",
            "What nine of ten orders took at most, over what they were forecast to take.",
            registry=registry,
        )
        self.refused = Counter(
            "reimagen_generator_refused",
            "Requests that were not drawn, or not to their end, by reason.",
            ("reason",),
            registry=registry,
        )
        self.abandoned = Counter(
            "reimagen_generator_abandoned", "Requests whose callers went away while they waited.", registry=registry
        )
        for priority in Priority:
            for metric in (self.depth, self.in_flight, self.wait_s):
                metric.labels(priority.name.lower())
        for outcome in ("let_in", "refused"):
            self.decision_s.labels(outcome)
        self.margin.set(1.0)
        for reason in REFUSALS:
            self.refused.labels(reason)
