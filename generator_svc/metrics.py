"""What generation counts beside its calls, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class GeneratorMetrics:
    """Steps and stages: their time, how full their batches are, what they keep; pictures drawn."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step_s = Histogram(
            "reimagen_generator_step_seconds",
            "Time of one step of a batch.",
            ("stage",),
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self.batch = Histogram(
            "reimagen_generator_batch_trajectories",
            "Trajectories that shared a step.",
            ("stage",),
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.stage_s = Histogram(
            "reimagen_generator_stage_seconds",
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
            "reimagen_generator_degraded_orders",
            "Orders drawn without retrieved neighbors, because retrieval failed.",
            registry=registry,
        )
