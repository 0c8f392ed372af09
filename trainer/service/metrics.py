"""What the trainer's service counts beside its calls, for Prometheus. Labels are states and presets, never runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer.service.run_record import RunState
from trainer.service.runs import Runs


class RunMetrics(Collector):
    """Runs by state; of those that run the examples a second and the loss, by preset. Looked up when they are read."""

    def __init__(self, runs: Runs, registry: CollectorRegistry) -> None:
        self._runs = runs
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See `prometheus_client`."""
        records = self._runs.all()
        states = Counter(record.state for record in records)
        family = GaugeMetricFamily("reimagen_trainer_runs", "Runs by state.", labels=["state"])
        for state in RunState:
            family.add_metric([state.value], states[state])
        yield family
        rates: dict[str, list[float]] = {}
        losses: dict[str, list[float]] = {}
        for record in records:
            progress = self._runs.progress(record) if record.state == RunState.RUNNING else None
            if progress is not None and progress.loss is not None:
                rates.setdefault(record.spec.preset, []).append(progress.examples_per_second)
                losses.setdefault(record.spec.preset, []).append(progress.loss)
        yield _family(
            "reimagen_trainer_runs_examples_per_second",
            "Examples a second of the runs of a preset, all together.",
            ((preset, sum(found)) for preset, found in rates.items()),
        )
        yield _family(
            "reimagen_trainer_runs_loss",
            "Training loss of the runs of a preset, their mean.",
            ((preset, sum(found) / len(found)) for preset, found in losses.items()),
        )

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing is looked up to register it."""
        return iter(())


def _family(name: str, text: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["preset"])
    for preset, value in values:
        family.add_metric([preset], value)
    return family
