"""Rules about what manifests say of one another: references, probes, rollouts, the way to the end, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from common.service.config import ConfigError, read_settings
from generator_svc import __main__ as generator
from retrieval_svc import settings as retrieval
from tests.deploy.k8s.connections import container_port
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
from trainer.service import settings as trainer

MARGIN_S = 5
SETTINGS: dict[tuple[str, ...], tuple[type, str]] = {
    ("python", "-m", "retrieval_svc", "serve"): (retrieval.RetrievalSettings, retrieval.PREFIX),
    ("python", "-m", "generator_svc", "serve"): (generator.GeneratorSettings, generator.PREFIX),
    ("python", "-m", "trainer", "serve"): (trainer.TrainerSettings, trainer.PREFIX),
}
OURS = "REIMAGEN_"
HASHED = re.compile(r"-[a-z0-9]{10}$")
CANARY = "deploy.k8s.triton_canary"
# What commands write, by the flag that says where: most have a default below the working folder, which a pod cannot write.
WRITTEN = {
    ("retrieval_svc", "import"): ("report",),
    ("trainer", "corpus"): ("corpus",),
    ("trainer", "prepare"): ("data",),
    ("trainer", "knn"): ("data",),
    ("trainer", "fit"): ("run",),
    ("deploy.k8s.snapshots",): ("snapshots",),
}
NEVER_WRITTEN = ("secret", "configMap", "image", "projected", "downwardAPI")
# What the GPU operator brings into the cluster and we ask: its namespace, the labels of the Service, the port.
ELSEWHERE = [("gpu-operator", {"app": "nvidia-dcgm-exporter"}, "gpu-metrics")]


def settings(manifests: Manifests) -> Iterator[str]:
    """Every variable of ours is a field of its service's settings, every value can be read and goes with the others."""
    for pod in pods(manifests):
        for container in pod.containers:
            variables = environment(container, manifests)
            known = SETTINGS.get(tuple(container.get("command", ())))
            if known is None:
                yield from (f"{pod.owner}: nobody reads {name}" for name in variables if name.startswith(OURS))
                continue
            yield from (
                f"{pod.owner}: {name} is another's"
                for name in variables
                if name.startswith(OURS) and not name.startswith(known[1])
            )
            try:
                settings_of(container, manifests).check()
            except ConfigError as error:
                yield f"{pod.owner}: {error}"


def configuration(manifests: Manifests) -> Iterator[str]:
    """Configuration never changes in place: its name is of its content, and somebody reads it."""
    read = {name for pod in pods(manifests) for kind, name in _named_by(pod) if kind == "ConfigMap"}
    for each in of_kind(manifests, "ConfigMap"):
        name = each["metadata"]["name"]
        if "grafana_dashboard" in each["metadata"].get("labels", {}):
            continue  # no pod's: Grafana's sidecar reads it, and shows what it has become
        if each.get("immutable") is not True or not HASHED.search(name):
            yield f"ConfigMap/{name} may change"
        if name not in read:
            yield f"ConfigMap/{name} is read by nobody"


def settings_of(container: Manifest, manifests: Manifests) -> Any:
    """The settings that a container's process makes of its variables. Raises ConfigError as it would."""
    kind, prefix = SETTINGS[tuple(container["command"])]
    return read_settings(kind, prefix=prefix, environ=environment(container, manifests))


def listening(manifests: Manifests) -> Iterator[str]:
    """A service listens, for calls and for Prometheus, at the ports that its container declares, on all addresses."""
    for pod in pods(manifests):
        for container in pod.containers:
            declared = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            if tuple(container.get("command", ())) in SETTINGS:
                told = settings_of(container, manifests)
                found = {"grpc": told.address, "metrics": f"0.0.0.0:{told.metrics_port}"}
            elif container.get("command") == ["tritonserver"]:
                flags = _flags(container)
                found = {
                    "grpc": f"{flags['grpc-address']}:{flags['grpc-port']}",
                    "metrics": f"{flags['metrics-address']}:{flags['metrics-port']}",
                }
            elif is_run(pod.name) or pod.name == "train":
                found = {"metrics": _flags(container)["metrics-address"]}
            else:
                continue
            for name, address in found.items():
                if address != f"0.0.0.0:{declared.get(name)}":
                    yield f"{pod.owner}: {name} is declared at {declared.get(name)}, and listens at {address}"


def written(manifests: Manifests) -> Iterator[str]:
    """Where a command writes files is told, and a volume that it may write is there."""
    for pod in pods(manifests):
        volumes = {v["name"] for v in pod.spec.get("volumes", ()) if not any(kind in v for kind in NEVER_WRITTEN)}
        for container in pod.containers:
            words = [*container.get("command", ()), *container.get("args", ())]
            given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
            mounts = [
                PurePath(mount["mountPath"])
                for mount in container.get("volumeMounts", ())
                if mount["name"] in volumes and not mount.get("readOnly")
            ]
            for command, flags in WRITTEN.items():
                for flag in flags if tuple(words[2 : 2 + len(command)]) == command else ():
                    if not any(PurePath(given.get(flag, "")).is_relative_to(mount) for mount in mounts):
                        yield f"{pod.owner}: --{flag}: {given.get(flag)} is on none of {', '.join(map(str, mounts))}"


def references(manifests: Manifests) -> Iterator[str]:
    """Whatever is named is there: configuration, volumes, accounts, classes, ports, pods behind selectors."""
    there = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    found = list(pods(manifests))
    for pod in found:
        yield from (
            f"{pod.owner}: there is no {kind} {name}" for kind, name in _named_by(pod) if (kind, name) not in there
        )
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())} | _claimed(pod, manifests)
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", ())}
        yield from (f"{pod.owner}: volume {name} is mounted or declared alone" for name in volumes ^ mounted)
        yield from (f"{pod.owner}: {fault}" for fault in _lost_ports(pod))
    for service in of_kind(manifests, "Service"):
        behind = [pod for pod in found if selects({"matchLabels": service["spec"]["selector"]}, _all_labels(pod))]
        name = service["metadata"]["name"]
        if not behind:
            yield f"Service/{name} selects nothing"
        for port in service["spec"]["ports"]:
            wanted = port.get("targetPort", port["port"])
            if not all(container_port(pod, wanted) for pod in behind) and not is_run(name):
                yield f"Service/{name}: no port {wanted} in its pods"
    yield from _selectors(manifests, found)


def probes(manifests: Manifests) -> Iterator[str]:
    """What serves has all three probes; those over gRPC ask by names that the service knows; a Triton's models are asked."""
    for pod in pods(manifests):
        if pod.owner.split("/")[0] not in ("Deployment", "StatefulSet"):
            continue
        for container in pod.spec["containers"]:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = container.get(kind)
                if probe is None:
                    yield f"{pod.owner}: {container['name']} has no {kind}"
                elif probe.get("timeoutSeconds", 1) < 2:
                    yield f"{pod.owner}: {kind} gets too little time"
                elif tuple(container.get("command", ())) in SETTINGS and "grpc" in probe:
                    wanted = "readiness" if kind == "readinessProbe" else "liveness"
                    if probe["grpc"].get("service") != wanted:
                        yield f"{pod.owner}: {kind} asks for {probe['grpc'].get('service')!r}, not for {wanted!r}"
            if container["name"] == "triton" and CANARY not in _commanded(container.get("livenessProbe", {})):
                yield f"{pod.owner}: its liveness does not ask the models"


def grace(manifests: Manifests) -> Iterator[str]:
    """A pod that ends has time for what is under way: preStop, drain, the longest call, and a margin."""
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            before_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if tuple(container.get("command", ())) in SETTINGS:
                told = settings_of(container, manifests)
                needed_s = before_s + told.drain_delay_s + told.grace_s
                longest_s = told.max_deadline_s if pod.name == "generator" else told.default_deadline_s
                if not 0 < longest_s <= told.grace_s:
                    yield f"{pod.owner}: a call may take {longest_s or math.inf:g} s, and gets {told.grace_s:g} s at the end"
            elif container.get("command") == ["tritonserver"]:
                live_s = int(_flags(container)["exit-timeout-secs"])
                needed_s = before_s + live_s
                if live_s < longest_picture_s(manifests):
                    yield f"{pod.owner}: a stage may take {longest_picture_s(manifests):g} s, and gets {live_s} s at the end"
            elif pod.owner.startswith("StatefulSet/"):
                needed_s = before_s
            else:
                continue
            if not before_s:
                yield f"{pod.owner}: no preStop: balancers still send"
            if pod.spec["terminationGracePeriodSeconds"] < needed_s + MARGIN_S:
                yield (
                    f"{pod.owner}: is killed after {pod.spec['terminationGracePeriodSeconds']} s,"
                    f" and needs {needed_s:g} + {MARGIN_S}"
                )


def longest_picture_s(manifests: Manifests) -> float:
    """The generator's bound of a call."""
    (pod,) = (pod for pod in pods(manifests) if pod.owner == "Deployment/generator")
    return float(settings_of(pod.containers[0], manifests).max_deadline_s)


def _flags(container: Manifest) -> dict[str, str]:
    pairs = [argument.removeprefix("--").partition("=") for argument in container["args"]]
    return {name: value for name, _, value in pairs}


def _commanded(probe: Manifest) -> list[str]:
    return probe.get("exec", {}).get("command", [])


def _named_by(pod: Pod) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod.spec["serviceAccountName"]
    yield "PriorityClass", pod.spec.get("priorityClassName", "none")
    for volume in pod.spec.get("volumes", ()):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
    for container in pod.containers:
        yield from (("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", ()))


def _claimed(pod: Pod, manifests: Manifests) -> set[str]:
    if not pod.owner.startswith("StatefulSet/"):
        return set()
    spec = named(manifests, "StatefulSet", pod.name)["spec"]
    return {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}


def _lost_ports(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            for how in ("grpc", "httpGet", "tcpSocket"):
                wanted = probe.get(how, {}).get("port")
                if wanted is not None and not container_port(pod, wanted):
                    yield f"{kind} asks port {wanted}, which is not there"
            for word in _commanded(probe):
                port = word.rpartition(":")[2]
                if ":" in word and port.isdecimal() and not container_port(pod, int(port)):
                    yield f"{kind} asks port {port}, which is not there"


def _all_labels(pod: Pod) -> dict[str, str]:
    return pod.labels | {"batch.kubernetes.io/job-name": pod.name}


def _looks_elsewhere(monitor: Manifest) -> Iterator[str]:
    """What is wrong with a ServiceMonitor of what others bring into the cluster."""
    spec = monitor["spec"]
    sought = [(name, spec["selector"].get("matchLabels")) for name in spec["namespaceSelector"].get("matchNames", ())]
    for endpoint in spec["endpoints"]:
        if sought != [(namespace, labels) for namespace, labels, port in ELSEWHERE if port == endpoint["port"]]:
            yield f"ServiceMonitor/{monitor['metadata']['name']} asks {endpoint['port']} of {sought}, which nobody brings"


def _selectors(manifests: Manifests, found: list[Pod]) -> Iterator[str]:
    for each in of_kind(manifests, "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        selector = each["spec"].get("selector", each["spec"].get("podSelector", {}))
        if not any(selects(selector, pod.labels) for pod in [*found, *train_job_pods(manifests)]):
            yield f"{each['kind']}/{each['metadata']['name']} selects nothing"
    for each in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" not in {pod.owner for pod in found}:
            yield f"{each['kind']}/{each['metadata']['name']} scales nothing"
    services = of_kind(manifests, "Service")
    for monitor in of_kind(manifests, "ServiceMonitor"):
        if "namespaceSelector" in monitor["spec"]:
            yield from _looks_elsewhere(monitor)
            continue
        chosen = [s for s in services if selects(monitor["spec"]["selector"], s["metadata"].get("labels", {}))]
        ports = {port["name"] for service in chosen for port in service["spec"]["ports"]}
        if len(chosen) != 1 or not {each["port"] for each in monitor["spec"]["endpoints"]} <= ports:
            yield f"ServiceMonitor/{monitor['metadata']['name']} finds {len(chosen)} Services, ports {sorted(ports)}"
    for each in of_kind(manifests, "StatefulSet"):
        if each["spec"]["serviceName"] not in {service["metadata"]["name"] for service in services}:
            yield f"StatefulSet/{each['metadata']['name']}: no Service {each['spec']['serviceName']}"
    for pod in found:
        owner = [m for m in of_kind(manifests, "Deployment", "StatefulSet") if m["metadata"]["name"] == pod.name]
        if owner and not selects(owner[0]["spec"]["selector"], pod.labels):
            yield f"{pod.owner}: its selector is not of its pods"
