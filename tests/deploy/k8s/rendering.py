"""What the overlays are when kubectl has rendered them, and what the trainer's service adds to them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.service.config import read_settings
from trainer.service.commands import fit_arguments
from trainer.service.kubernetes_manifests import PREFIX as RUN_PREFIX
from trainer.service.kubernetes_manifests import job_manifest, service_manifest, train_job_manifest
from trainer.service.run_record import RunRecord, RunState
from trainer.service.run_spec import PodResources, RunSpec
from trainer.service.settings import PREFIX, TrainerSettings

ROOT = Path(__file__).resolve().parents[3]
MANIFESTS = ROOT / "deploy" / "k8s"
KUBECTL = ROOT / "build" / "kubectl" / "kubectl"
NAMESPACE = "reimagen"
OVERLAYS = ("local-cpu", "gpu", "gpu-ha")
OTHERWISE = "otherwise"  # what no overlay takes, in an overlay of this test
OPTIONS = (
    "gpu",
    "model-store",
    "train-job",
    "network-policies",
    "images",
    "monitoring",
    "autoscaling",
    "signed-images",
)
INDEX = (
    "batch.kubernetes.io/job-completion-index"  # a label that the Job controller gives pods, from Kubernetes 1.28 on
)
FIELDS = {"metadata.namespace": NAMESPACE, "metadata.name": "a-pod", "metadata.uid": "a-uid"}

Manifest = dict[str, Any]
Manifests = list[Manifest]


@dataclass(frozen=True)
class Pod:
    """A pod of a workload: `owner` is `Kind/name`."""

    owner: str
    labels: dict[str, str]
    spec: Manifest
    replicas: int

    @property
    def name(self) -> str:
        """Of the workload."""
        return self.owner.split("/")[1]

    @property
    def containers(self) -> list[Manifest]:
        """Those that run, and those that run before."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]


def kustomize(folder: Path) -> Manifests:
    """What kubectl renders of a folder; whatever it says on standard error is a failure."""
    assert KUBECTL.is_file(), f"{KUBECTL} is not there; run `make kubectl`"
    done = subprocess.run([str(KUBECTL), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


@cache
def rendered(overlay: str) -> str:
    """The stack, its Jobs, and what the trainer would make of runs, as JSON that callers parse for themselves. Hundreds of
    tests do, and YAML takes them longer by far."""
    stack = _otherwise() if overlay == OTHERWISE else kustomize(MANIFESTS / "overlays" / overlay)
    jobs = kustomize(MANIFESTS / "overlays" / ("gpu" if overlay == OTHERWISE else overlay) / "jobs")
    found = [*stack, *jobs]
    return json.dumps([*found, *runs(found)])


def _otherwise() -> Manifests:
    with tempfile.TemporaryDirectory() as folder:
        there = os.path.relpath(MANIFESTS, Path(folder).resolve())
        options = [f"{there}/components/{name}" for name in OPTIONS]
        overlay = {"kind": "Kustomization", "resources": [f"{there}/base"], "components": options}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        return kustomize(Path(folder))


def stack(overlay: str) -> Manifests:
    """The documents of `rendered`, to be changed at will."""
    return json.loads(rendered(overlay))


def runs(manifests: Manifests) -> Manifests:
    """Jobs, TrainJobs and Services as the trainer's service makes them with the settings that it has there."""
    (pod,) = (pod for pod in pods(manifests) if pod.owner == "Deployment/trainer")
    settings = read_settings(TrainerSettings, prefix=PREFIX, environ=environment(pod.containers[0], manifests))
    cluster, made = settings.cluster(), []
    assert cluster is not None
    for name, spec in (
        ("one", RunSpec(preset="demo-64", data="demo")),
        ("many", RunSpec(preset="paper-64", data="laion", ranks=16, pod=PodResources(ranks=8, gpus=8))),
    ):
        record = RunRecord(
            name=name, spec=spec, state=RunState.QUEUED, attempt=1, token="token", created_s=0.0, queued_s=0.0
        )
        arguments = fit_arguments(name, spec, settings.folders())
        made += [job_manifest(record, arguments, cluster), train_job_manifest(record, arguments, cluster)]
        if spec.num_pods > 1:
            made.append(service_manifest(record, cluster, "7b1c"))
    return made


def is_run(name: str) -> bool:
    """Whether the trainer's service made it."""
    return name.startswith(RUN_PREFIX)


def pods(manifests: Manifests) -> Iterator[Pod]:
    """The pods of all workloads that are written out, of an indexed Job the first; see `train_job_pods`."""
    for manifest in manifests:
        owner, spec = f"{manifest['kind']}/{manifest['metadata']['name']}", manifest.get("spec", {})
        if manifest["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if manifest["kind"] in ("Deployment", "StatefulSet", "Job", "CronJob"):
            replicas = spec.get("replicas", spec.get("parallelism", 1))
            if "replicas" not in spec and manifest["kind"] == "Deployment":
                replicas = least_replicas(manifests, owner)
            template = spec["template"]
            given = {INDEX: "0"} if spec.get("completionMode") == "Indexed" else {}
            yield Pod(owner, template["metadata"]["labels"] | given, template["spec"], replicas)


def train_job_pods(manifests: Manifests) -> Iterator[Pod]:
    """The first pods of TrainJobs, as far as these say what they are; the rest is of their runtime, which is not ours."""
    for manifest in of_kind(manifests, "TrainJob"):
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        (patch,) = spec["runtimePatches"]
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        said = {key: spec["trainer"][key] for key in ("image", "command", "args", "env")}
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
            INDEX: "0",
        }
        yield Pod(f"TrainJob/{name}", labels, pod | {"containers": [container | said]}, spec["trainer"]["numNodes"])


def least_replicas(manifests: Manifests, owner: str) -> int:
    """What an autoscaler leaves of a workload; 1 where there is none."""
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        if f"{target['kind']}/{target['name']}" == owner:
            return scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount", 1))
    return 1


def of_kind(manifests: Manifests, *kinds: str) -> Manifests:
    """The manifests of these kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: Manifests, kind: str, name: str) -> Manifest:
    """The manifest of this kind and name."""
    (found,) = (manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name)
    return found


def environment(container: Manifest, manifests: Manifests) -> dict[str, str]:
    """The variables of a container as its process sees them; a Secret's value is its reference."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= named(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", ()):
        if "value" in variable:
            found[variable["name"]] = variable["value"]
        elif "fieldRef" in (source := variable["valueFrom"]):
            found[variable["name"]] = FIELDS.get(source["fieldRef"]["fieldPath"], "0")
        else:
            found[variable["name"]] = f"secret {source['secretKeyRef']['name']}/{source['secretKeyRef']['key']}"
    return found


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    for expression in selector.get("matchExpressions", ()):
        value, values = labels.get(expression["key"]), expression.get("values", ())
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[expression["operator"]]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
