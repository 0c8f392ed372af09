"""What a run tells Prometheus. The label is the preset, of which there are few; a run's name is no label."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

STEP_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WAIT_BUCKETS_S = (0.0001, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5)
SAVE_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONDITIONS = ("full", "text_only", "neighbors_only", "none", "wrong_neighbors")
LABELS = ("preset",)


class TrainingMetrics:
    """Figures of one run, as a recorder of its events."""

    def __init__(self, registry: CollectorRegistry, preset: str) -> None:
        self._preset = preset
        self._steps = Counter("reimagen_trainer_steps", "Steps taken.", LABELS, registry=registry)
        self._samples = Counter("reimagen_trainer_samples", "Examples trained on.", LABELS, registry=registry)
        self._nonfinite = Counter(
            "reimagen_trainer_nonfinite", "Steps skipped: their gradient was not finite.", LABELS, registry=registry
        )
        self._step_s = Histogram(
            "reimagen_trainer_step_duration_seconds",
            "Time of a step, its wait for the batch included.",
            LABELS,
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._wait_s = Histogram(
            "reimagen_trainer_data_wait_seconds",
            "Time that a step waited for its batch.",
            LABELS,
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self._loss = Gauge("reimagen_trainer_loss", "Loss of the last step.", LABELS, registry=registry)
        self._norm = Gauge(
            "reimagen_trainer_grad_norm",
            "Global gradient norm of the last step, before clipping.",
            LABELS,
            registry=registry,
        )
        self._rate = Gauge("reimagen_trainer_learning_rate", "Of the last step.", LABELS, registry=registry)
        self._held_out = Gauge(
            "reimagen_trainer_held_out_loss",
            "Held-out loss of the averaged weights, by what they were conditioned on.",
            (*LABELS, "condition"),
            registry=registry,
        )
        self._save_s = Histogram(
            "reimagen_trainer_checkpoint_duration_seconds",
            "Time to save a state.",
            LABELS,
            buckets=SAVE_BUCKETS_S,
            registry=registry,
        )
        self._saved = Gauge(
            "reimagen_trainer_checkpoint_last_success_timestamp_seconds",
            "When a state was last saved, in seconds since 1970.",
            LABELS,
            registry=registry,
        )

    def stepped(self, figures: dict[str, float], examples: int) -> None:
        """A step over `examples` has ended."""
        name = self._preset
        self._steps.labels(name).inc()
        self._samples.labels(name).inc(examples)
        self._nonfinite.labels(name).inc(figures["skipped"])
        self._step_s.labels(name).observe(figures["step_s"])
        self._wait_s.labels(name).observe(figures["data_wait_s"])
        self._loss.labels(name).set(figures["loss"])
        self._norm.labels(name).set(figures["gradient_norm"])
        self._rate.labels(name).set(figures["learning_rate"])

    def logged(self, line: dict[str, Any]) -> None:
        """A line of the log was written."""
        for condition in CONDITIONS if line["kind"] == "held_out" else ():
            if condition in line:
                self._held_out.labels(self._preset, condition).set(line[condition])

    def saved(self, seconds: float) -> None:
        """A state was saved in so many seconds."""
        self._save_s.labels(self._preset).observe(seconds)
        self._saved.labels(self._preset).set(time.time())

    def pictured(self, name: str, picture: Any, step: int) -> None:
        """Pictures are not for Prometheus."""
