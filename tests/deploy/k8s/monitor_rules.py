"""The rule about what Prometheus asks: every process that tells it something, where it listens, and once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from tests.deploy.k8s.connections import asked_port, scrapes
from tests.deploy.k8s.rendering import INDEX, Manifest, Manifests, Pod, of_kind, pods, selects, train_job_pods
from tests.deploy.k8s.workload_rules import SETTINGS, settings_of

QDRANT_PORT = 6333  # Qdrant tells its metrics where it takes HTTP
META = "__meta_kubernetes_pod_"
# What others put beside ours: a runtime, a mesh, whoever collects logs.
SIDECARS = [
    {"name": "logs", "ports": [{"name": "http", "containerPort": 15020}, {"name": "admin", "containerPort": 15000}]},
    {"name": "silent"},
]


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
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if len(found := targets(endpoint, pod)) != 1:
                    yield f"{name} asks {pod.owner} with sidecars at {sorted(map(sorted, found))}"


def tells(container: Manifest, manifests: Manifests) -> int:
    """The port at which a container's process answers Prometheus; 0: it does not."""
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in container.get("args", ()))
    if tuple(container.get("command", ())) in SETTINGS:
        return int(settings_of(container, manifests).metrics_port)
    if container["name"] == "qdrant":
        return QDRANT_PORT
    return int(flags.get("metrics-port") or flags.get("metrics-address", "").rpartition(":")[2] or 0)


def targets(endpoint: Manifest, pod: Pod) -> set[frozenset[tuple[str, str]]]:
    """What a PodMonitor's endpoint makes Prometheus ask of a pod that has sidecars: the labels of each target.

    As https://prometheus.io/docs/prometheus/latest/configuration/configuration/#pod finds them, one for each port that is
    declared and one for a container without any; then the operator's own relabeling, and the endpoint's. Targets with the
    same labels are one.
    """
    found: set[frozenset[tuple[str, str]]] = set()
    for container in [*pod.containers, *SIDECARS]:
        for port in container.get("ports") or [{}]:
            address = f"10.0.0.1:{port['containerPort']}" if port else "10.0.0.1"
            labels = {"__address__": address, f"{META}ip": "10.0.0.1", f"{META}container_name": container["name"]}
            labels |= {f"{META}container_port_name": port.get("name", ""), "container": container["name"]}
            if "port" in endpoint and port.get("name") != endpoint["port"]:
                continue
            if relabeled(labels, endpoint.get("relabelings", ())):
                found.add(frozenset((k, v) for k, v in labels.items() if not k.startswith("__meta_")))
    return found


def relabeled(labels: dict[str, str], rules: Iterable[Manifest]) -> bool:
    """Change the labels of a target or a series as Prometheus does (keep, drop, replace, labeldrop); False: it is dropped."""
    for rule in rules:
        if rule.get("action") == "labeldrop":
            for name in [name for name in labels if re.fullmatch(rule["regex"], name)]:
                del labels[name]
            continue
        value = ";".join(labels.get(name, "") for name in rule.get("sourceLabels", ()))
        match, action = re.fullmatch(rule.get("regex", "(.*)"), value), rule.get("action", "replace")
        assert action in ("keep", "drop", "replace"), action
        if action != "replace":
            if bool(match) is (action == "drop"):
                return False
        elif match:
            labels[rule["targetLabel"]] = match.expand(re.sub(r"\$(\d)", r"\\\1", rule.get("replacement", "$1")))
    return True
