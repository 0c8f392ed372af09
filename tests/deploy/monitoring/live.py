"""What has to hold of the metrics and the alerts of a stack that is up; test_local_up asks its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from deploy.monitoring.drill import Told, drill, watching
from tests.deploy.monitoring.autoscalers import demands
from tests.deploy.monitoring.exposition import MAX_SERIES, complaints, differences, scrape, series
from tests.deploy.monitoring.random_requests import generator_requests, retrieval_requests, send

NUM_REQUESTS = 10_000
PATIENCE_S = 60.0


def check_random_requests(addresses: Mapping[str, str], metrics: Mapping[str, str]) -> None:
    """So many random requests make no more series than a monitor takes, and none is named after what they say."""

    async def ask() -> list[Counter[str]]:
        return await asyncio.gather(
            send(addresses["retrieval"], retrieval_requests(NUM_REQUESTS)),
            send(addresses["generator"], generator_requests(NUM_REQUESTS)),
        )

    to_retrieval, to_generator = asyncio.run(ask())
    assert to_retrieval.total() == to_generator.total() == NUM_REQUESTS
    assert {"OK", "NOT_FOUND", "INVALID_ARGUMENT", "UNIMPLEMENTED"} <= set(to_retrieval), to_retrieval
    assert {"INVALID_ARGUMENT", "UNIMPLEMENTED"} <= set(to_generator), to_generator
    assert not {"INTERNAL", "UNKNOWN"} & {*to_retrieval, *to_generator}
    for process in ("retrieval", "generator"):
        found = series(scrape(metrics[process]))
        assert len(found) < MAX_SERIES, f"{process}: {len(found)} series"
        assert len(found) == len(set(found))


def check_documented(metrics: Mapping[str, str]) -> None:
    """Each process exports what METRICS.md says, and promtool has nothing to say against it."""
    for process, url in metrics.items():
        text = scrape(url)
        assert list(differences(process, text)) == []
        assert complaints(text) == []


def check_rules_are_evaluated(prometheus: str) -> None:
    """The stack's own Prometheus evaluates every rule without an error."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        with urlopen(f"{prometheus}/api/v1/rules", timeout=30) as page:
            groups = json.load(page)["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        if rules and all(rule["health"] != "unknown" for rule in rules):
            break
        assert time.monotonic() < give_up, "they are not evaluated"
        time.sleep(0.2)
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} >= {"ServiceDown", "ErrorBudgetBurnsFast"}


def check_autoscalers_are_answered(prometheus: str) -> None:
    """What the autoscalers of a cluster ask has one answer each: a number."""
    for demand in demands():
        give_up, found = time.monotonic() + PATIENCE_S, []
        while not found:
            assert time.monotonic() < give_up, f"no answer to {demand.query}"
            time.sleep(0.2)
            with urlopen(f"{prometheus}/api/v1/query?{urlencode({'query': demand.query})}", timeout=30) as page:
                found = json.load(page)["data"]["result"]
        assert len(found) == 1 and float(found[0]["value"][1]) >= 0, demand


def check_fire_drill(metrics: Mapping[str, str], folder: Path, *, pid: int) -> Told:
    """Retrieval is stopped: the pager is told, and nobody of what follows from it; then it is told that it is over."""
    targets = {job: url.removeprefix("http://").partition("/")[0] for job, url in metrics.items()}
    with watching(targets, folder) as watch:

        def wait_inhibited() -> None:
            give_up = time.monotonic() + PATIENCE_S
            while "TargetDown" not in watch.inhibited():
                assert time.monotonic() < give_up, "it is told as well"
                time.sleep(0.1)

        told = drill(watch, job="retrieval", pids=[pid], meanwhile=wait_inhibited)
        notices = list(watch.webhook.notices)
    assert told.fired.receiver == "pager"
    assert told.fired.annotations["summary"] == "No retrieval answers"
    assert told.fired.annotations["runbook_url"].endswith("#servicedown")
    assert not [each for each in notices if (each.alert, each.labels["service"]) == ("TargetDown", "retrieval")]
    return told
