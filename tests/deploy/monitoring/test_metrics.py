"""Metrics of a training, asked over a real socket; those of the running stack are asked in test_local_up."""

from __future__ import annotations

import pytest

from common.service.metrics import MetricsEndpoint, process_registry
from tests.deploy.monitoring.exposition import complaints, differences, families, scrape
from tests.deploy.monitoring.metrics_page import PAGE, documented
from trainer.training_metrics import CONDITIONS, TrainingMetrics

FIGURES = ("skipped", "step_s", "data_wait_s", "loss", "gradient_norm", "learning_rate")


@pytest.fixture
def training() -> str:
    registry = process_registry("trainer", revision="r")
    metrics = TrainingMetrics(registry, "demo-64")
    metrics.stepped(dict.fromkeys(FIGURES, 1.0), 8)
    metrics.logged({"kind": "held_out"} | dict.fromkeys(CONDITIONS, 0.5))
    metrics.saved(1.0)
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    try:
        return scrape(f"http://127.0.0.1:{endpoint.port}/metrics")
    finally:
        endpoint.close()


def test_a_training_exports_what_is_documented(training: str) -> None:
    assert list(differences("fit", training)) == []
    assert complaints(training) == []


def test_what_is_not_as_documented_is_found(training: str) -> None:
    other = training.replace("reimagen_trainer_loss", "reimagen_trainer_lost")
    assert list(differences("fit", other)) == [
        "fit: reimagen_trainer_lost is not documented",
        "fit: reimagen_trainer_loss is not exported",
    ]
    other = training.replace('preset="demo-64"', 'run="mine"')
    assert "fit: reimagen_trainer_loss has the labels ['run']" in list(differences("fit", other))
    other = training.replace("TYPE reimagen_trainer_loss gauge", "TYPE reimagen_trainer_loss counter")
    assert "fit: reimagen_trainer_loss is a counter" in list(differences("fit", other))
    assert complaints(other), "a counter without _total"


def test_the_page_names_each_metric_once_for_each_process() -> None:
    seen = [(metric.name, process) for metric in documented() for process in metric.processes]
    assert len(seen) == len(set(seen)) > 90
    assert {process for _, process in seen} == {"retrieval", "generator", "trainer", "triton", "fit"}
    for metric in documented():
        assert not metric.labels & {"prompt", "user", "request", "request_id", "run", "name_of_run"}, metric
    assert PAGE.read_text().count("<!-- of:") == 6


def test_families_take_series_apart() -> None:
    found = families(
        '# TYPE a histogram\na_bucket{le="1.0",x="y"} 1\na_sum{x="y"} 2\na_count{x="y"} 1\n# TYPE b gauge\n'
    )
    assert found["a"].labels == {"x"} and len(found["a"].series) == 3
    assert found["b"].labels is None
