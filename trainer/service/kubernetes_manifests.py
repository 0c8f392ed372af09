"""A run as Kubernetes wants it: a Job, indexed where there are several pods, or a TrainJob. Plain documents, no cluster.

The pods meet the restricted Pod Security Standard. The variables are those that Kubeflow's torch runtime sets, which torchrun
reads, so that the command is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.service.commands import TORCHRUN, TORCHRUN_GRACE, TRAINER, UNDER_TORCHRUN
from trainer.service.run_record import RunRecord

PREFIX = "reimagen-"
NAME_LABEL, INSTANCE_LABEL, QUEUE_LABEL = (
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "kueue.x-k8s.io/queue-name",
)
TOKEN = "reimagen/attempt"  # annotation: whose Job it is
APP = "reimagen-training"
CONTAINER = "node"  # as Kubeflow's runtimes call it
MASTER_PORT = 29500
METRICS_PORT = 9104  # where Prometheus asks the first rank
BAD_INPUT = 2  # status of a command that was given something that cannot be: no pod will do better
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_MANAGER = "reimagen/trainer"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Jobs are made of beside their runs; see `ClusterSettings`."""

    namespace: str
    image: str
    claim: str
    mount: Path
    account: str
    queue: str
    priority_class: str
    runtime: str
    user: int
    gpus: int
    gpu_resource: str
    cpus: int
    memory_bytes: int
    retries: int
    kept_s: int
    grace_s: int


def job_name(record: RunRecord) -> str:
    """Of an attempt's Job."""
    return f"{PREFIX}{record.name}-{record.attempt}"


def job_manifest(record: RunRecord, arguments: list[str], cluster: Cluster) -> dict[str, Any]:
    """A Job (batch/v1). A pod that dies is made anew, and goes on from the run's newest state."""
    pods = record.spec.num_pods
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": cluster.retries,
        "ttlSecondsAfterFinished": cluster.kept_s,
        "podReplacementPolicy": "Failed",  # never two at once in one run folder
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [BAD_INPUT]}},
            ]
        },
        "template": {"metadata": {"labels": _labels(record)}, "spec": _pod(record, arguments, cluster)},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(record, cluster), "spec": spec}


def service_manifest(record: RunRecord, cluster: Cluster, owner_uid: str) -> dict[str, Any]:
    """The headless Service by whose name the pods of a Job find the first one; it goes with the Job."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job_name(record), "uid": owner_uid}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(record, cluster) | {"ownerReferences": [owner]},
        "spec": {
            "clusterIP": "None",
            "selector": {"batch.kubernetes.io/job-name": job_name(record)},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
            "publishNotReadyAddresses": True,
        },
    }


def train_job_manifest(record: RunRecord, arguments: list[str], cluster: Cluster) -> dict[str, Any]:
    """A TrainJob (trainer.kubeflow.org/v1alpha1): its runtime starts the pods, and tells them of one another."""
    command, rest = _command(record, arguments)
    pod = {
        "volumes": _volumes(cluster),
        "securityContext": _pod_security(cluster),
        "terminationGracePeriodSeconds": cluster.grace_s,
        "containers": [{"name": CONTAINER, "volumeMounts": _mounts(cluster), "securityContext": _container_security()}],
    }
    if cluster.account:
        pod["serviceAccountName"] = cluster.account
    job = {"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(record, cluster),
        "spec": {
            "runtimeRef": {"name": cluster.runtime},
            "trainer": {
                "image": cluster.image,
                "command": command,
                "args": rest,
                "env": _common_env(cluster),
                "numNodes": record.spec.num_pods,
                "numProcPerNode": record.spec.pod.ranks or 1,
                "resourcesPerNode": _resources(record, cluster),
            },
            "runtimePatches": [
                {"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
            ],
        },
    }


def _pod(record: RunRecord, arguments: list[str], cluster: Cluster) -> dict[str, Any]:
    command, rest = _command(record, arguments)
    container = {
        "name": CONTAINER,
        "image": cluster.image,
        "command": command,
        "args": rest,
        "env": _common_env(cluster) + (_rendezvous_env(record) if record.spec.num_ranks > 1 else []),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": _resources(record, cluster),
        "securityContext": _container_security(),
        "volumeMounts": _mounts(cluster),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": cluster.grace_s,
        "securityContext": _pod_security(cluster),
        "containers": [container],
        "volumes": _volumes(cluster),
    }
    if record.spec.num_pods > 1:
        pod["subdomain"] = job_name(record)
    if cluster.account:
        pod["serviceAccountName"] = cluster.account
    if cluster.priority_class:
        pod["priorityClassName"] = cluster.priority_class
    return pod


def _command(record: RunRecord, arguments: list[str]) -> tuple[list[str], list[str]]:
    arguments = [*arguments, f"--metrics-address=0.0.0.0:{METRICS_PORT}"]
    if record.spec.num_ranks == 1:
        return ["python", *TRAINER], arguments
    return ["python", *TORCHRUN], [*UNDER_TORCHRUN, *arguments]


def _common_env(cluster: Cluster) -> list[dict[str, Any]]:
    return [
        {"name": "TQDM_DISABLE", "value": "1"},
        {"name": "HOME", "value": "/tmp"},
        {"name": TORCHRUN_GRACE, "value": str(cluster.grace_s)},
    ]


def _rendezvous_env(record: RunRecord) -> list[dict[str, Any]]:
    pods = record.spec.num_pods
    master = f"{job_name(record)}-0.{job_name(record)}" if pods > 1 else "127.0.0.1"
    values = {
        "PET_NNODES": pods,
        "PET_NPROC_PER_NODE": record.spec.pod.ranks or 1,
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": MASTER_PORT,
    }
    index = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}
    return [*({"name": name, "value": str(value)} for name, value in values.items()), index]


def _resources(record: RunRecord, cluster: Cluster) -> dict[str, Any]:
    asked = record.spec.pod
    amounts = {"cpu": str(asked.cpus or cluster.cpus), "memory": str(asked.memory_bytes or cluster.memory_bytes)}
    gpus = asked.gpus or cluster.gpus
    if gpus:
        amounts[cluster.gpu_resource] = str(gpus)
    return {"requests": amounts, "limits": {name: value for name, value in amounts.items() if name != "cpu"}}


def _volumes(cluster: Cluster) -> list[dict[str, Any]]:
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": cluster.claim}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _mounts(cluster: Cluster) -> list[dict[str, Any]]:
    return [
        {"name": "runs", "mountPath": str(cluster.mount)},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _pod_security(cluster: Cluster) -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": cluster.user,
        "runAsGroup": cluster.user,
        "fsGroup": cluster.user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _metadata(record: RunRecord, cluster: Cluster) -> dict[str, Any]:
    labels = _labels(record) | ({QUEUE_LABEL: cluster.queue} if cluster.queue else {})
    return {
        "name": job_name(record),
        "namespace": cluster.namespace,
        "labels": labels,
        "annotations": {TOKEN: record.token},
    }


def _labels(record: RunRecord) -> dict[str, str]:
    return {NAME_LABEL: APP, INSTANCE_LABEL: record.name}
