"""Runs as Jobs, through the official client, against a stand-in for the API server (no cluster can run here)."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.retry import NO_RETRY
from client.trainer import Figures, PodResources, TrainerClient, TrainingFailed
from tests.trainer.stand_in_kubernetes_api import NAMESPACE, StandInKubernetesApi, serving_stand_in
from tests.trainer.training_service import PATIENCE_S, ROOT, TrainerProcess, over, tiny, training, until

DONE = {"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-02T03:04:05Z"}
SPEC = tiny(executor="kubernetes_job")
PODS = tiny(ranks=4, pod=PodResources(ranks=2))

Clustered = tuple[TrainerProcess, TrainerClient, StandInKubernetesApi]


@pytest.fixture(scope="module")
def clustered(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    folder = tmp_path_factory.mktemp("clustered")
    flags = {
        "kubernetes-namespace": NAMESPACE,
        "kubernetes-config": folder / "kubeconfig",
        "kubernetes-image": "registry.example/reimagen-trainer:1",
        "kubernetes-claim": "shared",
        "kubernetes-mount": folder.parent,  # pytest's folder holds data and runs
        "kubernetes-poll-s": 0.05,
        "executor": "kubernetes_job",
    }
    with serving_stand_in(folder) as (cluster, _):
        named = [f"--{name}={value}" for name, value in flags.items()]
        with training(folder / "t", prepared_folder.parent, *named) as (service, client):
            yield service, client, cluster


def test_a_job_trains_for_real(clustered: Clustered) -> None:
    """Its container's own command is run, in place of a pod; the service sees what it writes, and that it is done."""
    service, client, cluster = clustered
    started = client.start(tiny(log_every_s=0.001, examples=16), name="real")
    assert started.spec.executor == "kubernetes_job"
    waiting = until(client, "real", lambda run: run.place)
    assert (waiting.state, waiting.place, waiting.status) == ("queued", "job/reimagen-real-1", "no pod is ready")
    pod = threading.Thread(target=cluster.run_job, args=("reimagen-real-1", ROOT))
    pod.start()
    until(client, "real", lambda run: run.state == "running")
    events = list(client.watch("real"))
    pod.join()
    assert events[-1].state == "succeeded" and events[-1].progress.examples == 16
    assert events[-1].ended_at == "2026-01-02T03:04:05Z"
    assert {event.kind for event in events if isinstance(event, Figures)} == {"train", "held_out"}
    assert not list((service.runs / "real" / "service").glob("process.json")), "nothing ran here"
    (said,) = (log for name, log in cluster.logs.items() if name.startswith("reimagen-real-1"))
    assert "metrics at http://127.0.0.1:" in said


def test_a_job_that_fails_says_why_and_its_pods_last_lines(clustered: Clustered) -> None:
    service, client, cluster = clustered
    client.start(SPEC, name="broken")
    until(client, "broken", lambda run: run.place)
    cluster.add_pod("reimagen-broken-1", "Failed", "its peer is gone", code=1)
    cluster.add_pod("reimagen-broken-1", "Failed", "first\ntrainer: error: --data: no such folder", code=2, index=1)
    cluster.add_pod("reimagen-broken-1", "Failed", "its peer is gone", code=1, index=2)
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 2"}
    cluster.set_status("jobs", "reimagen-broken-1", conditions=[failed])
    run = over(client, "broken")
    assert run.state == "failed"
    assert run.error == "PodFailurePolicy: exit code 2\nfirst\ntrainer: error: --data: no such folder"
    assert json.loads((service.runs / "broken" / "service" / "run.json").read_text())["exit_code"] == 2
    client.start(SPEC, name="broken")
    assert until(client, "broken", lambda run: run.place).place == "job/reimagen-broken-2"
    cluster.set_status("jobs", "reimagen-broken-2", conditions=[DONE])
    assert over(client, "broken").state == "succeeded"


def test_a_run_that_is_deleted_takes_the_jobs_of_all_its_attempts_along(clustered: Clustered) -> None:
    """And the next run of that name waits until they are gone: Jobs of two runs have the same name."""
    service, client, cluster = clustered
    names = [("jobs", f"reimagen-broken-{attempt}") for attempt in (1, 2)]
    assert not set(names) & set(_deleted(cluster))
    cluster.is_away = True
    with TrainerClient(service.address, retry=NO_RETRY) as hasty, pytest.raises(TrainingFailed) as refused:
        hasty.delete("broken")
    assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "EXECUTOR_AWAY")
    cluster.is_away = False
    client.delete("broken")
    assert set(names) <= set(_deleted(cluster))
    cluster.objects["pods"].clear()
    client.start(SPEC, name="broken")
    until(client, "broken", lambda run: run.status == "Job reimagen-broken-1 of a run that was deleted is not gone yet")
    cluster.finish_deletion("jobs", "reimagen-broken-1")
    run = until(client, "broken", lambda run: run.place)
    assert (run.attempt, run.state) == (1, "queued")
    cluster.set_status("jobs", "reimagen-broken-1", conditions=[DONE])
    assert over(client, "broken").state == "succeeded"


def test_cancelling_deletes_the_job_and_waits_until_it_is_gone(clustered: Clustered) -> None:
    _, client, cluster = clustered
    client.start(SPEC, name="unwanted")
    until(client, "unwanted", lambda run: run.place)
    cluster.set_status("jobs", "reimagen-unwanted-1", active=1, ready=1)
    until(client, "unwanted", lambda run: run.state == "running")
    client.cancel("unwanted")
    run = until(client, "unwanted", lambda run: ("jobs", "reimagen-unwanted-1") in _deleted(cluster))
    (options,) = [options for _, name, options in cluster.deleted if name == "reimagen-unwanted-1"]
    assert options["propagationPolicy"] == "Foreground"
    assert (run.state, run.cancelling) == ("running", True), "its pods save their state"
    cluster.finish_deletion("jobs", "reimagen-unwanted-1")
    assert over(client, "unwanted").state == "cancelled"


def test_several_pods_get_their_service_and_a_train_job_is_followed(clustered: Clustered) -> None:
    _, client, cluster = clustered
    client.start(tiny(ranks=4, pod=PodResources(ranks=2, gpus=1)), name="pods")
    until(client, "pods", lambda run: run.place)
    assert cluster.objects["jobs"]["reimagen-pods-1"]["spec"]["completions"] == 2
    service = cluster.objects["services"]["reimagen-pods-1"]
    assert (
        service["metadata"]["ownerReferences"][0]["uid"]
        == cluster.objects["jobs"]["reimagen-pods-1"]["metadata"]["uid"]
    )
    client.start(tiny(executor="kubernetes_train_job"), name="flow")
    run = until(client, "flow", lambda run: run.place)
    assert run.place == "trainjob/reimagen-flow-1"
    cluster.set_status("trainjobs", "reimagen-flow-1", jobsStatus=[{"name": "node", "ready": 1}])
    until(client, "flow", lambda run: run.state == "running")
    cluster.set_status("trainjobs", "reimagen-flow-1", conditions=[DONE])
    assert over(client, "flow").state == "succeeded"


def test_a_job_whose_service_is_refused_is_deleted_before_its_run_ends(clustered: Clustered) -> None:
    """Else the next attempt would make a second Job over the same folder."""
    _, client, cluster = clustered
    cluster.refused["services"] = 403
    try:
        client.start(PODS, name="nameless")
        run = over(client, "nameless")
    finally:
        cluster.refused.clear()
    assert run.state == "failed"
    assert run.error == "Service reimagen-nameless-1 is refused: 403 no services now"
    assert ("jobs", "reimagen-nameless-1") in _deleted(cluster)


def test_so_is_one_that_waits_and_one_that_is_cancelled_meanwhile(clustered: Clustered) -> None:
    """The Job is made and its Service is not, first because the API server is busy."""
    _, client, cluster = clustered
    cluster.refused["services"] = 500
    try:
        for name in ("waiting", "dropped"):
            client.start(PODS, name=name)
            until(client, name, lambda run: "500" in run.status)
        client.cancel("dropped")
        until(client, "dropped", lambda run: ("jobs", "reimagen-dropped-1") in _deleted(cluster))
        cluster.finish_deletion("jobs", "reimagen-dropped-1")
        assert over(client, "dropped").state == "cancelled"
        cluster.refused["services"] = 403
        run = over(client, "waiting")
    finally:
        cluster.refused.clear()
    assert (run.state, run.error) == ("failed", "Service reimagen-waiting-1 is refused: 403 no services now")
    assert ("jobs", "reimagen-waiting-1") in _deleted(cluster)


def _deleted(cluster: StandInKubernetesApi) -> list[tuple[str, str]]:
    return [(kind, name) for kind, name, _ in cluster.deleted]


def test_a_watch_goes_on_when_the_service_ends_orderly_and_comes_back(clustered: Clustered) -> None:
    service, client, cluster = clustered
    client.start(SPEC, name="long")
    until(client, "long", lambda run: run.place)
    told: list[Any] = []
    with TrainerClient(service.address) as watching:
        reader = threading.Thread(target=lambda: [told.append(event) for event in watching.watch("long")])
        reader.start()
        until(client, "long", lambda run: told)
        assert service.end() == 0, "who watches holds nobody up"
        service.start().close()
        cluster.set_status("jobs", "reimagen-long-1", conditions=[DONE])
        reader.join(PATIENCE_S)
    assert told[0].state == "queued" and told[-1].state == "succeeded"


def test_a_read_key_looks_and_an_admin_key_starts(clustered: Clustered, tmp_path: Path, prepared_folder: Path) -> None:
    keys = {"read": "a key that may only look", "admin": "a key that may do anything"}
    for name, key in keys.items():
        (tmp_path / name).write_text(key)
    flags = [f"--{name}-keys-file={tmp_path / name}" for name in keys]
    with training(tmp_path / "t", prepared_folder.parent, *flags) as (service, nobody):
        with TrainerClient(service.address, api_key=keys["read"]) as reader:
            assert list(reader.list()) == []
            with pytest.raises(TrainingFailed) as refused:
                reader.cancel("nobody")
            assert refused.value.code == "PERMISSION_DENIED"
        with TrainerClient(service.address, api_key=keys["admin"]) as admin, pytest.raises(TrainingFailed) as refused:
            admin.cancel("nobody")
        assert refused.value.code == "NOT_FOUND"
        with pytest.raises(TrainingFailed) as refused:
            next(nobody.list())
        assert refused.value.code == "UNAUTHENTICATED"


def test_a_job_is_found_again_and_never_made_twice(clustered: Clustered) -> None:
    """Killed in the middle of everything, and the API server away while the next service starts."""
    service, client, cluster = clustered
    client.start(SPEC, name="kept")
    until(client, "kept", lambda run: run.place)
    service.end(signal.SIGKILL)
    cluster.is_away = True
    client.close()
    with service.start() as again:
        until(again, "kept", lambda run: "does not answer: 503" in run.status)
        cluster.set_status("jobs", "reimagen-kept-1", active=1, ready=1)
        cluster.is_away = False
        run = until(again, "kept", lambda run: run.state == "running")
        assert (run.place, run.status, run.attempt) == ("job/reimagen-kept-1", "", 1)
        cluster.finish_deletion("jobs", "reimagen-kept-1")
        gone = over(again, "kept")
        assert (gone.state, gone.error) == ("failed", "is gone")
        _check_refusals(again, cluster)


def _check_refusals(client: TrainerClient, cluster: StandInKubernetesApi) -> None:
    cluster.refusals = [(500, "etcd is busy"), (429, "later"), (403, "exceeded quota: gpus")]
    client.start(SPEC, name="greedy")
    run = over(client, "greedy")
    assert run.state == "failed"
    assert run.error == "Job reimagen-greedy-1 is refused: 403 exceeded quota: gpus"
    cluster.objects["jobs"]["reimagen-theirs-1"] = {"kind": "Job", "metadata": {"name": "reimagen-theirs-1"}}
    client.start(SPEC, name="theirs")
    run = over(client, "theirs")
    assert run.state == "failed" and "which is not of this run" in run.error


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("spec.pod.ranks", tiny(ranks=4, pod=PodResources(ranks=3))),
        ("spec.pod", tiny(executor="local", pod=PodResources(gpus=1))),
    ],
)
def test_pods_that_cannot_be_are_refused(clustered: Clustered, field: str, spec) -> None:
    service, _, _ = clustered
    with TrainerClient(service.address) as client, pytest.raises(TrainingFailed) as refused:
        client.start(spec)
    assert [violation.field for violation in refused.value.violations] == [field]
