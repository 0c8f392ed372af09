"""An admission whose clock goes when a test says so."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from generator_svc.admission import Admission, AdmissionLimits, Ticket
from generator_svc.admission_metrics import AdmissionMetrics
from generator_svc.call import Call
from generator_svc.estimates import StageTimes, StageWork
from generator_svc.waiting_line import Priority

LIMITS = AdmissionLimits(
    slots=2, max_waiting=4, max_waiting_s=30.0, aging_s=10.0, least_time=0.8, least_time_crowded=1.0
)


def work(seconds: int, stage: int = 64) -> tuple[StageWork, ...]:
    """Work of so many seconds where a row takes one."""
    return (StageWork(stage=stage, steps=seconds, rows=1.0),)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Desk:
    """An admission on a clock of its own, and its figures."""

    def __init__(self, limits: AdmissionLimits = LIMITS) -> None:
        self.clock = Clock()
        self.registry = CollectorRegistry()
        self.times = StageTimes({64: 1.0}, now=self.clock)
        self.admission = Admission(limits, self.times, AdmissionMetrics(self.registry), now=self.clock)

    def take(self, seconds: int = 1, priority: Priority = Priority.NORMAL, *, within_s: float | None = None) -> Ticket:
        """A ticket for so much work."""
        until_s = None if within_s is None else self.clock.now_s + within_s
        remaining = (lambda: None) if until_s is None else (lambda: until_s - self.clock.now_s)
        return self.admission.take(work(seconds), priority, Call(time_remaining_s=remaining))

    def figure(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        value = self.registry.get_sample_value(f"reimagen_generator_{name}", labels)
        assert value is not None, name
        return value
