"""What a process exports at /metrics, and how it differs from what METRICS.md says of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.request import urlopen

import pytest

from deploy.monitoring.tools import installed
from tests.deploy.monitoring.metrics_page import documented

MAX_SERIES = 2000  # of a pod: more is refused by its monitor
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count", "")}
_NOT_OURS = re.compile(r"^nv_\w+ (counter metrics should have|metric names should not|non-histogram and non-summary)")


@dataclass
class Exported:
    """One family: `labels` of its series, None where it has none yet."""

    kind: str
    labels: frozenset[str] | None = None
    series: list[str] = field(default_factory=list)


def scrape(url: str) -> str:
    """The text of an endpoint."""
    with urlopen(url, timeout=30) as page:
        return page.read().decode()


def series(text: str) -> list[str]:
    """Its series, each with its labels."""
    return [line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")]


def families(text: str) -> dict[str, Exported]:
    """Its metrics by name."""
    found = {name: Exported(kind) for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)}
    owners = {name + end: name for name, each in found.items() for end in _SUFFIXES.get(each.kind, ("",))}
    for each in series(text):
        name, _, labels = each.partition("{")
        family = found[owners[name]]
        family.series.append(each)
        family.labels = frozenset(re.findall(r'(\w+)="', labels)) - {"le"}
    return found


def differences(process: str, text: str) -> Iterator[str]:
    """What METRICS.md says of a process and it does not export, and the reverse."""
    exported = families(text)
    told = {metric.name: metric for metric in documented() if process in metric.processes}
    yield from (f"{process}: {name} is not documented" for name in sorted(exported.keys() - told.keys()))
    yield from (f"{process}: {name} is not exported" for name in sorted(told.keys() - exported.keys()))
    for name in sorted(exported.keys() & told.keys()):
        if exported[name].kind != told[name].kind:
            yield f"{process}: {name} is a {exported[name].kind}"
        labels = exported[name].labels
        if labels is not None and labels != told[name].labels:
            yield f"{process}: {name} has the labels {sorted(labels)}"


def complaints(text: str) -> list[str]:
    """What `promtool check metrics` finds, but for Triton's own names, which are its maker's."""
    promtool = installed("promtool")
    if promtool is None:
        pytest.skip("promtool is not there, and `make prometheus` could not fetch it")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 or said
    return [line for line in said if line.strip() and not _NOT_OURS.match(line)]
