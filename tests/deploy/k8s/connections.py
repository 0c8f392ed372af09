"""The connections that the stack makes, derived from where it reads them: the one list of who talks to whom.

Each source names the code that opens the connection. An address that a manifest gives is followed through its Service to pods
and the port of their containers; what settings could name a peer and are not followed here fails a test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from tests.deploy.k8s.rendering import (
    Manifest,
    Manifests,
    Pod,
    environment,
    is_run,
    named,
    of_kind,
    pods,
    selects,
    train_job_pods,
)
from trainer.service.kubernetes_manifests import MASTER_PORT

CLIENT, PROMETHEUS, DNS, API_SERVER, OBJECT_STORE = "client", "prometheus", "dns", "api server", "object store"

FOLLOWED = {  # settings that name a peer: which code dials it
    "REIMAGEN_GENERATOR_RETRIEVAL_ADDRESS": "generator_svc/retrieval_client.py",
    "REIMAGEN_GENERATOR_TRITON_ADDRESSES": "generator_svc/triton_endpoints.py",
    "REIMAGEN_RETRIEVAL_QDRANT_URL": "retrieval_svc/qdrant_connection.py",
}
OWN = ("ADDRESS",)  # where a service listens
NEVER_SET = ("TRACE_ENDPOINT",)  # common/service/tracing.py: no overlay has a collector
ARGUMENTS = {  # the same of commands
    "--retrieval": "trainer/knn_lookup.py, client/knowledge_base.py",
    "--address": "retrieval_svc/imports/service_sink.py",
}
CALLED = ("generator", "retrieval", "trainer")  # client/channel.py
_ADDRESS = re.compile(r"(?:\w+:/+)?([a-z0-9.-]+):(\d+)")


@dataclass(frozen=True)
class Connection:
    """`source` and `target` are workloads (`Kind/name`) or those outside; `code` is what opens it."""

    source: str
    target: str
    port: int
    code: str


def connections(manifests: Manifests) -> Iterator[Connection]:
    """All of them."""
    for pod in train_job_pods(manifests):
        if has_train_jobs(manifests):  # where the service makes them; the others are here to be checked
            yield Connection(pod.owner, pod.owner, MASTER_PORT, "trainer/distributed.py")
    for pod in pods(manifests):
        yield from _dialed(pod, manifests)
        if is_run(pod.name) or pod.name == "train":
            yield Connection(pod.owner, pod.owner, MASTER_PORT, "trainer/distributed.py")
        if pod.owner == "StatefulSet/qdrant" and pod.replicas > 1:
            yield Connection(pod.owner, pod.owner, 6335, "Qdrant's consensus and shard transfers")
        for container in pod.containers:
            variables = environment(container, manifests)
            if variables.get("REIMAGEN_TRAINER_KUBERNETES_NAMESPACE"):
                for port in (443, 6443):
                    yield Connection(pod.owner, API_SERVER, port, "trainer/service/kubernetes_api.py")
            if "RCLONE_CONFIG_STORE_ENDPOINT" in variables and container["name"] == "fetch":
                yield Connection(pod.owner, OBJECT_STORE, 443, "rclone")
    for each in scrapes(manifests):
        if has_train_jobs(manifests) or not each.target.startswith("TrainJob/"):
            yield each
    for name in CALLED:
        (port,) = (p for p in named(manifests, "Service", name)["spec"]["ports"] if p["name"] == "grpc")
        for owner, number in behind(name, port["port"], manifests):
            yield Connection(CLIENT, owner, number, "client/channel.py")


def has_train_jobs(manifests: Manifests) -> bool:
    """Whether runs are TrainJobs unless somebody asks for something else."""
    trainer = next(pod.containers[0] for pod in pods(manifests) if pod.owner == "Deployment/trainer")
    return environment(trainer, manifests)["REIMAGEN_TRAINER_EXECUTOR"] == "kubernetes_train_job"


def behind(service: str, port: int, manifests: Manifests) -> Iterator[tuple[str, int]]:
    """The workloads whose pods answer at a Service's port, and at which of theirs."""
    spec = named(manifests, "Service", service)["spec"]
    (entry,) = (each for each in spec["ports"] if each["port"] == port)
    for pod in pods(manifests):
        if selects({"matchLabels": spec["selector"]}, pod.labels):
            number = container_port(pod, entry.get("targetPort", port))
            assert number, f"{pod.owner} has no port {entry.get('targetPort', port)}"
            yield pod.owner, number


def container_port(pod: Pod, wanted: str | int) -> int | None:
    """The number of a pod's port, by its name or number; None: it has none such."""
    for container in pod.containers:
        for port in container.get("ports", ()):
            if wanted in (port.get("name"), port["containerPort"]):
                return int(port["containerPort"])
    return None


def addresses(pod: Pod, manifests: Manifests) -> Iterator[tuple[str, str, str]]:
    """What a pod is told of peers: (address, code that dials it, where it is told)."""
    for container in pod.containers:
        for name, value in environment(container, manifests).items():
            if name in FOLLOWED:
                yield from ((each.strip(), FOLLOWED[name], name) for each in value.split(","))
        for argument in container.get("args", ()):
            flag, _, value = argument.partition("=")
            if flag in ARGUMENTS:
                yield value, ARGUMENTS[flag], flag


def _dialed(pod: Pod, manifests: Manifests) -> Iterator[Connection]:
    for address, code, _ in addresses(pod, manifests):
        found = _ADDRESS.fullmatch(address)
        assert found, f"{pod.owner}: {address!r} is no address of a Service"
        for owner, port in behind(found[1], int(found[2]), manifests):
            yield Connection(pod.owner, owner, port, code)
    yield Connection(pod.owner, DNS, 53, "getaddrinfo")


def scrapes(manifests: Manifests) -> Iterator[Connection]:
    """What Prometheus asks by the monitors, also of TrainJobs that nobody makes there; a port that is not there is left out."""
    for monitor in of_kind(manifests, "ServiceMonitor"):
        for service in _services(monitor, manifests):
            for endpoint in monitor["spec"]["endpoints"]:
                ports = [p["port"] for p in service["spec"]["ports"] if p["name"] == endpoint["port"]]
                for port in ports:
                    for owner, number in behind(service["metadata"]["name"], port, manifests):
                        yield Connection(PROMETHEUS, owner, number, "monitors")
    for monitor in of_kind(manifests, "PodMonitor"):
        for pod in chain(pods(manifests), train_job_pods(manifests)):
            if selects(monitor["spec"]["selector"], pod.labels):
                for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                    if number := asked_port(endpoint, pod):
                        yield Connection(PROMETHEUS, pod.owner, number, "monitors")


def asked_port(endpoint: Manifest, pod: Pod) -> int | None:
    """Where a PodMonitor's endpoint asks a pod: at a port that it names, or where it says by itself; None: nowhere."""
    if "port" in endpoint:
        return container_port(pod, endpoint["port"])
    made = [rule["replacement"] for rule in endpoint.get("relabelings", ()) if rule.get("targetLabel") == "__address__"]
    numbers = {int(each.rpartition(":")[2]) for each in made}
    return numbers.pop() if len(numbers) == 1 else None


def _services(monitor: Manifest, manifests: Manifests) -> Manifests:
    return [
        service
        for service in of_kind(manifests, "Service")
        if selects(monitor["spec"]["selector"], service["metadata"].get("labels", {}))
    ]
