"""Rules that a manifest keeps by itself. Each gives the violations in a set of manifests, one line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

from tests.deploy.k8s.rendering import Manifest, Manifests, Pod, is_run, of_kind, pods, train_job_pods
from tests.trainer.stand_in_kubernetes_api import invalid

KUBERNETES = "1.35"
SCHEMAS = Path(__file__).parent / "schemas"
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
# and, of images, https://github.com/kubernetes/kubernetes/pull/130394 (1.33), which the page does not have
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret", "image",
}  # fmt: skip
HOST = ("hostNetwork", "hostPID", "hostIPC")
CUSTOM = (
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "LocalQueue",
    "TrainJob",
    "NamespacedImageValidatingPolicy",
)
SECRET_WORDS = ("PASSWORD", "TOKEN", "SECRET", "API_KEY")
TOKENS = {"Deployment/trainer"}  # who may ask the API server


def schema(manifests: Manifests) -> Iterator[str]:
    """The API server would take it, strictly: no unknown field."""
    for manifest in manifests:
        said = _invalid(json.dumps(manifest))
        if said:
            yield f"{manifest['kind']}/{manifest['metadata']['name']}: {said}"
        if manifest["kind"] == "ScaledObject":
            yield from schema([_autoscaler(manifest)])


def unique(manifests: Manifests) -> Iterator[str]:
    """No two bear one name; all are in the namespace, or in none."""
    seen = set()
    for manifest in manifests:
        key = (manifest["kind"], manifest["metadata"]["name"])
        if key in seen:
            yield f"{key} is there twice"
        seen.add(key)
        namespace = manifest["metadata"].get("namespace")
        if namespace != (None if manifest["kind"] in ("Namespace", "PriorityClass") else "reimagen"):
            yield f"{key} is in namespace {namespace}"


def restricted(manifests: Manifests) -> Iterator[str]:
    """The restricted Pod Security Standard, which the namespace enforces."""
    (namespace,) = of_kind(manifests, "Namespace")
    if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "Namespace: does not enforce it"
    for pod in chain(pods(manifests), train_job_pods(manifests)):
        yield from (f"{pod.owner}: {fault}" for fault in _faults(pod))


def hardened(manifests: Manifests) -> Iterator[str]:
    """What the standard leaves open: root file systems that are read only, no tokens, no variables of Services."""
    for pod in pods(manifests):
        if pod.spec.get("automountServiceAccountToken") is not (pod.owner in TOKENS):
            yield f"{pod.owner}: automountServiceAccountToken"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.owner}: enableServiceLinks"
        for container in pod.containers:
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield f"{pod.owner}: the root of {container['name']} can be written"
        for volume in pod.spec.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"] and not _is_training(pod):
                yield f"{pod.owner}: {volume['name']} has no bound"


def resources(manifests: Manifests) -> Iterator[str]:
    """Each container asks for processors and memory, and gets no more memory than it asked for; GPUs are whole."""
    for pod in pods(manifests):
        for container in pod.containers:
            asked = container.get("resources", {})
            requests, limits = asked.get("requests", {}), asked.get("limits", {})
            if "cpu" not in requests or "memory" not in requests or requests["memory"] != limits.get("memory"):
                yield f"{pod.owner}: resources of {container['name']}"
            if "cpu" in limits:
                yield f"{pod.owner}: {container['name']} is throttled"
            gpus = {k: v for k, v in requests.items() if k.startswith("nvidia.com/")}
            if gpus != {k: v for k, v in limits.items() if k.startswith("nvidia.com/")}:
                yield f"{pod.owner}: {container['name']} asks for other GPUs than it gets"
            if any(not value.isdecimal() for value in gpus.values()):
                yield f"{pod.owner}: {container['name']} asks for part of a GPU"


def secrets(manifests: Manifests) -> Iterator[str]:
    """No secret stands in a manifest: not as an object, not as a value of a variable."""
    for manifest in of_kind(manifests, "Secret"):
        yield f"Secret/{manifest['metadata']['name']} is written out"
    literal = {
        f"ConfigMap/{each['metadata']['name']}": each.get("data", {}) for each in of_kind(manifests, "ConfigMap")
    }
    for pod in pods(manifests):
        for container in pod.containers:
            literal[pod.owner] = {v["name"]: v["value"] for v in container.get("env", ()) if "value" in v}
    for place, values in literal.items():
        for name, value in values.items():
            if any(word in name for word in SECRET_WORDS) and not value.startswith("/etc/reimagen/"):
                yield f"{place}: {name} is written out"


@cache
def _schema_of(kind: str) -> Draft202012Validator:
    (path,) = SCHEMAS.glob(f"*-{kind}.json")
    return Draft202012Validator(json.loads(path.read_text()))


@cache  # most of a stack is that of the test before
def _invalid(text: str) -> str:
    manifest = json.loads(text)
    if manifest["kind"] not in CUSTOM:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return str(error.message)[:300]
        return ""
    if manifest["kind"] == "TrainJob":
        return invalid(manifest)
    errors: list[Any] = sorted(_schema_of(manifest["kind"]).iter_errors(manifest), key=str)
    return errors[0].message[:300] if errors else ""


def _autoscaler(scaled: Manifest) -> Manifest:
    """What KEDA makes of it, as far as its types leave that open."""
    behavior = scaled["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
    spec = {"scaleTargetRef": scaled["spec"]["scaleTargetRef"], "maxReplicas": 1, "behavior": behavior}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "k"}, "spec": spec}


def _faults(pod: Pod) -> Iterator[str]:
    yield from (name for name in HOST if pod.spec.get(name))
    yield from (
        f"volume {volume['name']} is of {kind}"
        for volume in pod.spec.get("volumes", ())
        for kind in set(volume) - {"name"} - VOLUMES
    )
    of_pod = pod.spec.get("securityContext", {})
    if of_pod.get("sysctls") or of_pod.get("windowsOptions"):
        yield "sysctls or windowsOptions"
    for container in [*pod.containers, *pod.spec.get("ephemeralContainers", ())]:
        own = of_pod | container.get("securityContext", {})
        if own.get("runAsNonRoot") is not True or own.get("runAsUser") == 0:
            yield f"{container['name']} may run as root"
        if own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{container['name']} has no seccomp profile"
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may get privileges"
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{container['name']} has capabilities"
        if own.get("procMount", "Default") != "Default" or "seLinuxOptions" in own:
            yield f"{container['name']} has procMount or seLinuxOptions"
        if any("host" in how for how in _requests(container)):
            yield f"{container['name']} has probes or hooks of another host"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{container['name']} takes a port of its node"


def _requests(container: Manifest) -> Iterator[Manifest]:
    hooks = container.get("lifecycle", {})
    asked = [container.get(name, {}) for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    for each in [*asked, hooks.get("preStop", {}), hooks.get("postStart", {})]:
        yield from (each[how] for how in ("httpGet", "tcpSocket") if how in each)


def _is_training(pod: Pod) -> bool:
    """Its volumes are the trainer's affair: their bound is the memory of the container and the quota of the node."""
    return is_run(pod.name) or pod.name == "train"
