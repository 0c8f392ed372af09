"""The rule about what Prometheus asks: every process that tells it something, where it listens, and once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from tests.deploy.k8s.connections import asked_port, scrapes
from tests.deploy.k8s.rendering import INDEX, Manifest, Manifests, of_kind, pods, selects, train_job_pods
from tests.deploy.k8s.workload_rules import SETTINGS, settings_of

QDRANT_PORT = 6333  # Qdrant tells its metrics where it takes HTTP


def scraping(manifests: Manifests) -> Iterator[str]:
    """Where there are monitors, what tells metrics is asked for them, by one of them; of a run, the first rank alone."""
    monitors = of_kind(manifests, "PodMonitor")
    if not monitors:
        return
    everyone = list(chain(pods(manifests), train_job_pods(manifests)))
    told = {(pod.owner, port) for pod in everyone if (port := tells(pod.spec["containers"][0], manifests))}
    asked = Counter((each.target, each.port) for each in scrapes(manifests))
    yield from (f"{owner} tells its metrics at {port}, and nobody asks" for owner, port in sorted(told - asked.keys()))
    yield from (f"{owner} is asked at {port}, where it tells nothing" for owner, port in sorted(asked.keys() - told))
    yield from (
        f"{owner}:{port} is asked by {number} monitors" for (owner, port), number in asked.items() if number > 1
    )
    for monitor in monitors:
        selector, name = monitor["spec"]["selector"], f"PodMonitor/{monitor['metadata']['name']}"
        for pod in (pod for pod in everyone if selects(selector, pod.labels)):
            if not all(asked_port(endpoint, pod) for endpoint in monitor["spec"]["podMetricsEndpoints"]):
                yield f"{name} asks {pod.owner} nowhere"
            if INDEX in pod.labels and selects(selector, pod.labels | {INDEX: "1"}):
                yield f"{name} asks ranks of {pod.owner} that do not listen"


def tells(container: Manifest, manifests: Manifests) -> int:
    """The port at which a container's process answers Prometheus; 0: it does not."""
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in container.get("args", ()))
    if tuple(container.get("command", ())) in SETTINGS:
        return int(settings_of(container, manifests).metrics_port)
    if container["name"] == "qdrant":
        return QDRANT_PORT
    return int(flags.get("metrics-port") or flags.get("metrics-address", "").rpartition(":")[2] or 0)
