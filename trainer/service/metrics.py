"""What the trainer's service counts beside its calls, for Prometheus. Labels are states and presets, never runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer.endings import CAUSES, OTHER, cause_of
from trainer.service.run_record import RunRecord, RunState
from trainer.service.runs import Runs

_STATES = "state-*.safetensors"  # of a run's folder


class RunMetrics(Collector):
    """Runs by state, and why they failed; of those that run their speed, loss and age, by preset. Looked up when they are
    read."""

    def __init__(self, runs: Runs, folder: Callable[[str], Path], registry: CollectorRegistry) -> None:
        """`folder` gives a run's, by its name."""
        self._runs = runs
        self._folder = folder
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See `prometheus_client`."""
        records = self._runs.all()
        states = Counter(record.state for record in records)
        family = GaugeMetricFamily("reimagen_trainer_runs", "Runs by state.", labels=["state"])
        for state in RunState:
            family.add_metric([state.value], states[state])
        yield family
        causes = Counter(cause_of(record.exit_code) for record in records if record.state == RunState.FAILED)
        family = GaugeMetricFamily("reimagen_trainer_runs_failed", "Runs that have failed, by why.", labels=["cause"])
        for cause in (*CAUSES.values(), OTHER):
            family.add_metric([cause], causes[cause])
        yield family
        yield from self._of_those_that_run([record for record in records if record.state == RunState.RUNNING])

    def _of_those_that_run(self, records: Iterable[RunRecord]) -> Iterator[GaugeMetricFamily]:
        rates: dict[str, list[float]] = {}
        losses: dict[str, list[float]] = {}
        moved: dict[str, float] = {}
        saved: dict[str, float] = {}
        for record in records:
            preset, progress = record.spec.preset, self._runs.progress(record)
            began_s = record.started_s or record.queued_s
            last_s = max(began_s, progress.time_s) if progress else began_s
            moved[preset] = min(last_s, moved.get(preset, last_s))
            state_s = max(began_s, _saved_s(self._folder(record.name)))
            saved[preset] = min(state_s, saved.get(preset, state_s))
            if progress is not None and progress.loss is not None:
                rates.setdefault(preset, []).append(progress.examples_per_second)
                losses.setdefault(preset, []).append(progress.loss)
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

        yield _family(
            "reimagen_trainer_runs_progress_timestamp_seconds",
            "When a run of the preset last wrote to its log or began, of the one for which that is longest ago.",
            moved.items(),
        )
        yield _family(
            "reimagen_trainer_runs_checkpoint_timestamp_seconds",
            "When a run of the preset last saved its state or began, of the one for which that is longest ago.",
            saved.items(),
        )

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing is looked up to register it."""
        return iter(())


def _saved_s(folder: Path) -> float:
    """When the newest state in a run's folder was written; 0: there is none."""
    found = 0.0
    for path in folder.glob(_STATES):
        with suppress(FileNotFoundError):  # an older one was removed a moment ago
            found = max(found, path.stat().st_mtime)
    return found


def _family(name: str, text: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["preset"])
    for preset, value in values:
        family.add_metric([preset], value)
    return family
