"""What runs are to a cluster: documents that its schema knows, strictly, and that keep the promises of a pod."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun

from tests.trainer.stand_in_kubernetes_api import invalid
from trainer.fit_command import add_fit_flags
from trainer.service.commands import TORCHRUN, local_command
from trainer.service.kubernetes_manifests import (
    METRICS_PORT,
    Cluster,
    job_manifest,
    job_name,
    service_manifest,
    train_job_manifest,
)
from trainer.service.run_record import RunRecord, RunState
from trainer.service.run_spec import PodResources, RunSpec

CLUSTER = Cluster(
    namespace="training",
    image="registry.example/reimagen-trainer:1",
    claim="shared",
    mount=Path("/srv/reimagen"),
    account="trainer",
    queue="gpus",
    priority_class="batch",
    runtime="torch-distributed",
    user=10001,
    gpus=0,
    gpu_resource="nvidia.com/gpu",
    cpus=4,
    memory_bytes=1 << 30,
    retries=3,
    kept_s=600,
    grace_s=90,
)
BARE = replace(CLUSTER, account="", queue="", priority_class="", gpus=2)
ARGUMENTS = ["fit", "--preset=paper-64", "--run=/srv/reimagen/runs/big"]
METRICS = f"--metrics-address=0.0.0.0:{METRICS_PORT}"


def record(name: str = "big", **spec: Any) -> RunRecord:
    """A run's second attempt."""
    return RunRecord(
        name=name,
        spec=RunSpec(preset="paper-64", data="laion", **spec),
        state=RunState.QUEUED,
        attempt=2,
        token="mark",
        created_s=0.0,
        queued_s=0.0,
    )


RECORDS = [
    record(),
    record("a" * 40),
    record(ranks=4),
    record(ranks=16, pod=PodResources(ranks=8, gpus=8, cpus=64, memory_bytes=1 << 39)),
    record(ranks=8, pod=PodResources(ranks=8)),
]


@pytest.mark.parametrize("cluster", [CLUSTER, BARE])
@pytest.mark.parametrize("run", RECORDS)
def test_the_api_server_would_take_it(run: RunRecord, cluster: Cluster) -> None:
    for manifest in (
        job_manifest(run, ARGUMENTS, cluster),
        service_manifest(run, cluster, "7b1c"),
        train_job_manifest(run, ARGUMENTS, cluster),
    ):
        assert invalid(manifest) == ""
        assert len(manifest["metadata"]["name"]) <= 58, "with the index of a pod it is a host's name"


def test_what_would_not_be_taken_is_found() -> None:
    """The checks can fail."""
    job, train_job = job_manifest(record(), ARGUMENTS, CLUSTER), train_job_manifest(record(), ARGUMENTS, CLUSTER)
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    assert "comand" in invalid(job)
    train_job["spec"]["trainer"]["numNode"] = 1
    assert invalid(train_job) == "unknown field .spec.trainer.numNode"


@pytest.mark.parametrize("run", RECORDS)
def test_its_pods_are_restricted(run: RunRecord) -> None:
    """The restricted Pod Security Standard, and nothing of the API server's in the pod."""
    pod = job_manifest(run, ARGUMENTS, CLUSTER)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert writable == {"/srv/reimagen", "/tmp", "/dev/shm"}
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert pod["terminationGracePeriodSeconds"] == 90
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_one_rank_is_the_trainer_itself() -> None:
    job = job_manifest(record(), ARGUMENTS, CLUSTER)["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert [*container["command"], *container["args"]] == ["python", "-m", "trainer", *ARGUMENTS, METRICS]
    assert (job["completions"], job["parallelism"], job["podReplacementPolicy"]) == (1, 1, "Failed")
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [2]
    assert not any(variable["name"].startswith("PET_") for variable in container["env"])


@pytest.mark.parametrize("run", RECORDS)
def test_prometheus_is_told_where_the_first_rank_answers(run: RunRecord) -> None:
    """As the command itself reads it, at the port that the container names."""
    (container,) = job_manifest(run, ARGUMENTS, CLUSTER)["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"name": "metrics", "containerPort": METRICS_PORT}]
    for part in (container, train_job_manifest(run, ARGUMENTS, CLUSTER)["spec"]["trainer"]):
        given = part["args"][part["args"].index("fit") + 1 :]
        flags = argparse.ArgumentParser()
        add_fit_flags(flags)
        assert flags.parse_known_args(given)[0].metrics_address == f"0.0.0.0:{METRICS_PORT}"


def test_several_pods_find_the_first_one() -> None:
    """The variables are those that torchrun reads, and the name is that of the first pod of an indexed Job."""
    run = record(ranks=16, pod=PodResources(ranks=8, gpus=8))
    job = job_manifest(run, ARGUMENTS, CLUSTER)
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", 2)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][-1] == "trainer.torchrun" and container["args"][:3] == ["-m", "--", "trainer"]
    given = {variable["name"]: variable for variable in container["env"]}
    service = service_manifest(run, CLUSTER, "7b1c")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert given["PET_MASTER_ADDR"]["value"] == f"{job_name(run)}-0.{service['metadata']['name']}"
    assert (given["PET_NNODES"]["value"], given["PET_NPROC_PER_NODE"]["value"]) == ("2", "8")
    assert "job-completion-index" in given["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert given["PET_MASTER_PORT"]["value"] == str(service["spec"]["ports"][0]["port"])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["metadata"]["ownerReferences"][0]["uid"] == "7b1c"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_a_train_job_says_the_same() -> None:
    run = record(ranks=16, pod=PodResources(ranks=8, gpus=8))
    job, train_job = job_manifest(run, ARGUMENTS, CLUSTER), train_job_manifest(run, ARGUMENTS, CLUSTER)
    trainer, (container,) = train_job["spec"]["trainer"], job["spec"]["template"]["spec"]["containers"]
    for name in ("image", "command", "args"):
        assert trainer[name] == container[name]
    assert trainer["resourcesPerNode"] == container["resources"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert train_job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert train_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def test_torchrun_gives_its_ranks_the_time_that_a_cancelled_run_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun itself reads what it is given; of its own it would give 30 s."""
    command = local_command(ARGUMENTS, 2, grace_s=119.5)
    config, _, _ = torchrun.config_from_args(torchrun.parse_args(command[command.index(TORCHRUN[-1]) + 1 :]))
    assert config.shutdown_timeout == 120
    run = record(ranks=16, pod=PodResources(ranks=8, gpus=8))
    (container,) = job_manifest(run, ARGUMENTS, CLUSTER)["spec"]["template"]["spec"]["containers"]
    for part in (container, train_job_manifest(run, ARGUMENTS, CLUSTER)["spec"]["trainer"]):
        with monkeypatch.context() as pod:
            for variable in part["env"]:
                if "value" in variable:
                    pod.setenv(variable["name"], variable["value"])
            config, _, _ = torchrun.config_from_args(torchrun.parse_args(part["args"]))
        assert config.shutdown_timeout == CLUSTER.grace_s
