"""What the generator counts about the Tritons that it asks, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from generator_svc.triton_errors import Kind

_STUB_DEAD: Kind = "stub_dead"
_QUEUE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RUN_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CANARY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class TritonMetrics:
    """By model, and by endpoint for as long as it is one; a target is `model@endpoint`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.attempts = Counter(
            "reimagen_generator_triton_attempts", "Requests sent to Triton.", ("model",), registry=registry
        )
        self.retries = Counter(
            "reimagen_generator_triton_retries", "Attempts beyond a request's first.", ("model",), registry=registry
        )
        self.errors = Counter(
            "reimagen_generator_triton_errors",
            "Attempts that failed, by what was wrong.",
            ("model", "kind"),
            registry=registry,
        )
        self.queue_s = Histogram(
            "reimagen_generator_triton_queue_seconds",
            "Time from sending a stage to its first step.",
            ("model",),
            buckets=_QUEUE_BUCKETS_S,
            registry=registry,
        )
        self.run_s = Histogram(
            "reimagen_generator_triton_run_seconds",
            "Time from a stage's first step to its pictures.",
            ("model",),
            buckets=_RUN_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge(
            "reimagen_generator_triton_in_flight", "Requests under way.", ("model", "endpoint"), registry=registry
        )
        self.ejections = Counter(
            "reimagen_generator_triton_ejections",
            "Times that an endpoint was taken out of use.",
            ("model", "endpoint"),
            registry=registry,
        )
        self.canary_success = Gauge(
            "reimagen_canary_success",
            "1 while an endpoint is in use; 0 from its ejection until a canary has passed.",
            ("target",),
            registry=registry,
        )
        self.canary_last_success = Gauge(
            "reimagen_canary_last_success_timestamp_seconds",
            "When a canary last passed.",
            ("target",),
            registry=registry,
        )
        self.canary_s = Histogram(
            "reimagen_canary_duration_seconds",
            "Time that a canary took which passed.",
            ("model",),
            buckets=_CANARY_BUCKETS_S,
            registry=registry,
        )

    def begin(self, model: str) -> None:
        """A model will be asked. Deaths of its interpreter are counted from 0, so that Prometheus sees the first: each one
        calls somebody."""
        self.errors.labels(model, _STUB_DEAD)

    def forget(self, model: str, endpoint: str) -> None:
        """Drop the series of an endpoint that is none any more."""
        for by_endpoint in (self.in_flight, self.ejections):
            by_endpoint.remove(model, endpoint)
        for by_target in (self.canary_success, self.canary_last_success):
            by_target.remove(f"{model}@{endpoint}")
