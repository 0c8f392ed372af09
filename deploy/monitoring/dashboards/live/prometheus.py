"""A Prometheus of one's own over given targets, and its HTTP API as the dashboards use it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from common.files import write_atomic
from common.service.server import die_with_parent
from deploy.local.children import ROOT, ChildFailed

RULES = Path(__file__).parents[2] / "rules"
HERE = ROOT / "build" / "prometheus" / "prometheus"
GPU_MONITOR = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "gpus.yaml"
ASK_S, START_S, STOP_S, POLL_S = 20.0, 30.0, 10.0, 0.1


class QueryFailed(Exception):
    """Prometheus refused a query; the message is what it says."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A time series: its labels, and its values by time in seconds since 1970."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def has_values(self) -> bool:
        """Whether any value is a number."""
        return any(math.isfinite(value) for value in self.values)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is scraped as which job; `relabelings` change the labels of what it tells, as Prometheus' configuration has them."""

    job: str
    address: str
    relabelings: tuple[Mapping[str, Any], ...] = ()


class Prometheus:
    """Answers queries."""

    def __init__(self, url: str) -> None:
        self.url = url

    def at(self, expr: str, moment: float) -> list[Series]:
        """An instant query.

        Raises:
            QueryFailed: it is none.
        """
        return _series(self._ask("query", query=expr, time=moment)["result"], moment)

    def between(self, expr: str, start: float, end: float, step_s: float) -> list[Series]:
        """A range query.

        Raises:
            QueryFailed: it is none.
        """
        return _series(self._ask("query_range", query=expr, start=start, end=end, step=step_s)["result"], end)

    def knows(self, metric: str) -> bool:
        """Whether a target tells of the metric, with or without a series."""
        family = re.sub(r"_(total|bucket|sum|count)$", "", metric)  # OpenMetrics' name of it
        return any(self._ask("metadata", metric=name) for name in (family, metric))

    def targets(self) -> dict[str, str]:
        """Health by address: `up`, `down` or `unknown`."""
        found = self._ask("targets", state="active")["activeTargets"]
        return {each["labels"]["instance"]: each["health"] for each in found}

    def _ask(self, what: str, **parameters: object) -> Any:
        try:
            with urlopen(f"{self.url}/api/v1/{what}?{urlencode(parameters)}", timeout=ASK_S) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:
            raise QueryFailed(f"{parameters.get('query')}: {json.load(error)['error']}") from None


def metric_relabelings(monitor: Path) -> tuple[Mapping[str, Any], ...]:
    """Those of the first endpoint of a ServiceMonitor in a file, as Prometheus' configuration has them."""
    (endpoint, *_) = yaml.safe_load(monitor.read_text())["spec"]["endpoints"]
    return tuple(
        {re.sub(r"([A-Z])", lambda found: f"_{found[1].lower()}", key): value for key, value in each.items()}
        for each in endpoint.get("metricRelabelings", ())
    )


@contextmanager
def running_prometheus(
    targets: Sequence[Target], folder: Path, port: int, *, scrape_s: float, rules: Sequence[Path]
) -> Iterator[Prometheus]:
    """One over `targets`, for as long as the block lasts; its data and its log are kept in `folder`.

    Raises:
        ChildFailed: there is none on this machine, or it does not start.
    """
    program = str(HERE) if HERE.exists() else shutil.which("prometheus")
    if program is None:
        raise ChildFailed("prometheus: not installed; `make prometheus` fetches it")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "prometheus.yml", json.dumps(_config(targets, scrape_s, rules)))  # JSON is YAML
    flags = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "series",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *(f"--{name}={value}" for name, value in flags.items())],
            stdout=log,
            stderr=log,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        yield _ready(process, Prometheus(f"http://127.0.0.1:{port}"), folder / "prometheus.log")
    finally:
        process.terminate()
        process.wait(STOP_S)


def _ready(process: subprocess.Popen[bytes], prometheus: Prometheus, log: Path) -> Prometheus:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urlopen(f"{prometheus.url}/-/ready", timeout=ASK_S):
                return prometheus
        except OSError:
            time.sleep(POLL_S)
    lines = log.read_text(errors="replace").splitlines()
    raise ChildFailed(f"prometheus: does not start; its log ends with {lines[-1:]}")


def _config(targets: Sequence[Target], scrape_s: float, rules: Sequence[Path]) -> dict[str, Any]:
    interval = f"{round(1000 * scrape_s)}ms"
    by_job: dict[str, list[Target]] = {}
    for target in targets:
        by_job.setdefault(target.job, []).append(target)
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [each.address for each in of_job]}],
                "metric_relabel_configs": list(of_job[0].relabelings),
            }
            for job, of_job in by_job.items()
        ],
    }


def _series(result: Any, moment: float) -> list[Series]:
    if result and not isinstance(result[0], dict):  # a scalar: its time and its value
        return [Series(labels={}, times=(moment,), values=(float(result[1]),))]
    found = []
    for each in result:
        pairs = each.get("values") or [each["value"]]
        times, values = zip(*((float(t), float(v)) for t, v in pairs), strict=True)
        found.append(Series(labels=each["metric"], times=times, values=values))
    return found
