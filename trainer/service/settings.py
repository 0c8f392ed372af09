"""What the trainer's service is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.service.config import ConfigError, setting
from common.service.server import ServerSettings
from trainer.service.bounded_log import MAX_BYTES
from trainer.service.kubernetes_manifests import Cluster
from trainer.service.run_spec import ExecutorKind
from trainer.service.spec_rules import Folders

LEAST_LOG_BYTES = 64 << 10
PREFIX = "REIMAGEN_TRAINER_"
_POSITIVE = ("poll_s", "kubernetes_poll_s", "kubernetes_timeout_s")
_AT_LEAST_0 = ("max_runs", "cancel_grace_s", "kubernetes_cpus", "kubernetes_memory_bytes", "kubernetes_gpus")


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How runs become Jobs of a cluster."""

    kubernetes_namespace: str | None = setting(
        default=None, help="namespace of the Jobs; empty: nothing is run in a cluster"
    )
    kubernetes_config: Path | None = setting(  # noqa: RUF009 (a field)
        default=None, help="kubeconfig file; empty: the service runs in the cluster, and is let in as its account"
    )
    kubernetes_image: str | None = setting(default=None, help="image of the pods: python with this package")
    kubernetes_claim: str | None = setting(
        default=None, help="volume claim that holds --runs, --data and --weights, in the pods as here"
    )
    kubernetes_mount: Path | None = setting(  # noqa: RUF009 (a field)
        default=None, help="folder at which the claim is mounted, in the pods as here"
    )
    kubernetes_account: str | None = setting(default=None, help="service account of the pods; empty: the namespace's")
    kubernetes_queue: str | None = setting(default=None, help="Kueue queue of the Jobs; empty: none")
    kubernetes_priority_class: str | None = setting(default=None, help="priority class of the pods; empty: none")
    kubernetes_runtime: str = setting(
        default="torch-distributed", help="of a TrainJob: the ClusterTrainingRuntime that it is run by"
    )
    kubernetes_user: int = setting(default=10001, help="user and group of the pods' processes")
    kubernetes_gpus: int = setting(default=0, help="GPUs of a pod that asks for none")
    kubernetes_gpu_resource: str = setting(default="nvidia.com/gpu", help="what the cluster calls a GPU")
    kubernetes_cpus: int = setting(default=4, help="CPUs of a pod that asks for none")
    kubernetes_memory_bytes: int = setting(default=16 << 30, help="memory of a pod that asks for none")
    kubernetes_retries: int = setting(
        default=3, help="pods that may fail before a Job does; each goes on from the newest state"
    )
    kubernetes_kept_s: int = setting(default=86_400, help="seconds that a Job which is over stays in the cluster")
    kubernetes_poll_s: float = setting(default=5.0, help="seconds between looks at the Jobs")
    kubernetes_timeout_s: float = setting(default=10.0, help="seconds that the cluster's API gets to answer")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(ServerSettings, ClusterSettings):
    """What the trainer's service is told, by flags or by REIMAGEN_TRAINER_ variables."""

    address: str = setting(default="127.0.0.1:50059", help="where to listen: unix:/path or host:port (port 0: any)")
    runs: Path = setting(help="folder of the runs; made if it is not there")  # noqa: RUF009 (a field, as are the next)
    data: Path = setting(help="folder under which prepared corpora are")  # noqa: RUF009
    weights: Path = setting(help="folder under which weights are read and written")  # noqa: RUF009
    executor: Literal["local", "kubernetes_job", "kubernetes_train_job"] = setting(
        default="local",
        help="of runs that name none: local (processes of this machine), kubernetes_job, kubernetes_train_job",
    )
    local_runs: bool = setting(default=True, help="whether runs may be processes of this machine")
    max_runs: int = setting(default=1, help="local runs at once, further ones queue; 0: any number")
    cancel_grace_s: float = setting(
        default=120.0, help="seconds that a cancelled run gets to save its state before it is killed"
    )
    log_bytes: int = setting(
        default=MAX_BYTES,
        help="bytes on disk of what a local run (its newest attempt) or an export says: its beginning and its end",
    )
    poll_s: float = setting(default=0.5, help="seconds between looks at what local runs do and write")

    def check(self) -> None:
        """Raises ConfigError for a value that cannot be, by the setting's name."""
        for name in (*_POSITIVE, *_AT_LEAST_0):
            value, least = getattr(self, name), "positive" if name in _POSITIVE else "0 or more"
            if not 0 <= value < math.inf or (name in _POSITIVE and not value):
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is not {least}")
        if self.log_bytes < LEAST_LOG_BYTES:
            raise ConfigError(f"--log-bytes: {self.log_bytes} is not {LEAST_LOG_BYTES} or more")
        for name in ("data", "weights"):
            folder = getattr(self, name)
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"--{name}: {folder} is not a folder")
        self.cluster()
        if self.default_executor() not in self.executors():
            raise ConfigError(f"--executor: {self.executor} is not configured")

    def default_executor(self) -> ExecutorKind:
        """Of runs that name none."""
        return ExecutorKind(self.executor)

    def executors(self) -> set[ExecutorKind]:
        """What runs may be run as."""
        local = {ExecutorKind.LOCAL} if self.local_runs else set()
        in_cluster = {ExecutorKind.KUBERNETES_JOB, ExecutorKind.KUBERNETES_TRAIN_JOB}
        return local | (in_cluster if self.kubernetes_namespace else set())

    def folders(self) -> Folders:
        """Where things are, for processes that may be started elsewhere."""
        return Folders(runs=self.runs.absolute(), data=self.data.absolute(), weights=self.weights.absolute())

    def cluster(self) -> Cluster | None:
        """What Jobs are made of; None: there is no cluster.

        Raises:
            ConfigError: something is missing, or a folder is not on the claim.
        """
        if not self.kubernetes_namespace:
            return None
        for name in ("kubernetes_image", "kubernetes_claim", "kubernetes_mount"):
            if not getattr(self, name):
                raise ConfigError(f"--{name.replace('_', '-')}: missing; --kubernetes-namespace needs it")
        assert self.kubernetes_image and self.kubernetes_claim and self.kubernetes_mount
        mount = self.kubernetes_mount.absolute()
        for name in ("runs", "data", "weights"):
            if not getattr(self.folders(), name).is_relative_to(mount):
                raise ConfigError(f"--{name}: {getattr(self, name)} is not under --kubernetes-mount, {mount}")
        return Cluster(
            namespace=self.kubernetes_namespace,
            image=self.kubernetes_image,
            claim=self.kubernetes_claim,
            mount=mount,
            account=self.kubernetes_account or "",
            queue=self.kubernetes_queue or "",
            priority_class=self.kubernetes_priority_class or "",
            runtime=self.kubernetes_runtime,
            user=self.kubernetes_user,
            gpus=self.kubernetes_gpus,
            gpu_resource=self.kubernetes_gpu_resource,
            cpus=self.kubernetes_cpus,
            memory_bytes=self.kubernetes_memory_bytes,
            retries=self.kubernetes_retries,
            kept_s=self.kubernetes_kept_s,
            grace_s=int(self.cancel_grace_s),
        )
