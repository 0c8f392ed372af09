"""Why a Job has failed, of what its pods ended with: those of its newest attempt, and of these the one that tells most."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.stand_in_kubernetes_api import NAMESPACE, serving_stand_in
from trainer.endings import HUNG
from trainer.service.kubernetes_api import MAX_SAID, KubernetesApi

KILLED = 128 + 9
Pod = tuple[int, str, int]
"""Index, from when to when it lived, what it ended with."""


@pytest.mark.parametrize(
    ("pods", "telling"),
    [
        ([(0, "10:00-10:30", HUNG), (0, "10:31-10:40", 1)], (0, "10:31-10:40", 1)),
        ([(0, "10:31-10:40", 1), (0, "10:00-10:30", 4)], (0, "10:31-10:40", 1)),  # in whatever order they are listed
        (  # two attempts of two pods
            [(0, "10:00-10:30", 4), (1, "10:00-10:31", 1), (0, "10:32-10:50", 1), (1, "10:32-10:49", HUNG)],
            (1, "10:32-10:49", HUNG),
        ),
        (  # the second attempt's other pod was removed
            [(0, "10:00-10:30", HUNG), (1, "10:00-10:30", 1), (1, "10:32-10:50", 1)],
            (1, "10:32-10:50", 1),
        ),
        (  # or was ended because the Job had failed
            [(0, "10:00-10:30", HUNG), (1, "10:00-10:30", 1), (0, "10:32-10:51!", KILLED), (1, "10:32-10:50", 1)],
            (1, "10:32-10:50", 1),
        ),
        ([(0, "10:00-10:30", HUNG), (1, "10:00-10:25", KILLED)], (1, "10:00-10:25", KILLED)),  # one hung for the other
        ([(0, "10:00-10:30", HUNG), (1, "10:00-10:31", KILLED)], (0, "10:00-10:30", HUNG)),  # the one that hung
        ([(0, "10:00-10:30", 1), (1, "10:00-10:20", 1)], (1, "10:00-10:20", 1)),  # the other for lack of it
    ],
)
def test_the_newest_attempts_pod_that_says_why_is_told(pods: list[Pod], telling: Pod, tmp_path: Path) -> None:
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        for index, lived, code in pods:
            cluster.add_pod("a", "Failed", f"{index} {lived}", code=code, index=index, lived=lived)
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (telling[2], f"{telling[0]} {telling[1]}")


@pytest.mark.parametrize(
    ("log", "kept"), [("step 7", "step 7"), ("x" * MAX_SAID + "step 7", "x" * (MAX_SAID - 6) + "step 7")]
)
def test_a_pod_that_the_cluster_has_ended_says_why(log: str, kept: str, tmp_path: Path) -> None:
    """However much it has said itself."""
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        cluster.add_pod("a", "Failed", log, code=KILLED, reason="OOMKilled")
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (KILLED, f"OOMKilled\n{kept}")


EVICTED = {"reason": "Evicted", "message": "The node was low on resource: memory.\nContainer node was using 9Gi. "}
TOLD = "Evicted: The node was low on resource: memory. Container node was using 9Gi."
PREEMPTED = {"reason": "PreemptionByScheduler", "message": "preempting to accommodate a higher priority pod"}


def _disrupted(at: str) -> dict[str, str]:
    return PREEMPTED | {"type": "DisruptionTarget", "status": "True", "lastTransitionTime": f"2026-01-02T{at}:00Z"}


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (KILLED, EVICTED, TOLD),
        (None, EVICTED, TOLD),  # before its container began
        (None, {"reason": "UnexpectedAdmissionError"}, "UnexpectedAdmissionError"),
        (KILLED, {"reason": "DeadlineExceeded"}, "DeadlineExceeded"),
        (KILLED, {"reason": "Evicted", "message": "m" * 2 * MAX_SAID}, f"Evicted: {'m' * (MAX_SAID - 9)}"),
        (143, {"conditions": [_disrupted("10:00")]}, f"{PREEMPTED['reason']}: {PREEMPTED['message']}"),
        (1, {"conditions": [_disrupted("10:00") | {"status": "False"}]}, ""),
        (1, {"conditions": [_disrupted("10:00") | {"type": "Ready"}]}, ""),
    ],
)
def test_a_pod_that_the_cluster_has_taken_says_why(
    code: int | None, status: dict[str, object], told: str, tmp_path: Path
) -> None:
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        cluster.add_pod("a", "Failed", "step 7", code=code, status=status)
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (code, f"{told}\nstep 7".strip())


@pytest.mark.parametrize("lived", ["09:00-", "09:00-10:00", "09:00-10:00!"])
@pytest.mark.parametrize("code", [None, KILLED])
@pytest.mark.parametrize("other", [HUNG, 1])
def test_others_fail_for_lack_of_a_pod_that_was_taken(other: int, code: int | None, lived: str, tmp_path: Path) -> None:
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        cluster.add_pod("a", "Failed", "", code=code, lived=lived, status={"conditions": [_disrupted("10:00")]})
        cluster.add_pod("a", "Failed", "its peer is gone", code=other, index=1, lived="09:00-10:05")
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (code, f"{PREEMPTED['reason']}: {PREEMPTED['message']}")


@pytest.mark.parametrize("code", [1, 143])
@pytest.mark.parametrize("other", [HUNG, 1])
def test_others_may_fail_before_a_pod_that_is_taken_has_ended(other: int, code: int, tmp_path: Path) -> None:
    """It saves its state, or cannot for lack of the others; their status is none of a signal, and neither may its own be."""
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        taken = {"conditions": [_disrupted("10:00")]}
        cluster.add_pod("a", "Failed", "", code=code, lived="09:00-10:04", status=taken)
        cluster.add_pod("a", "Failed", "its peer is gone", code=other, index=1, lived="09:00-10:02")
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (code, f"{PREEMPTED['reason']}: {PREEMPTED['message']}")


@pytest.mark.parametrize("other", [HUNG, 1])
def test_others_fail_for_lack_of_a_pod_that_its_node_refused(other: int, tmp_path: Path) -> None:
    """Nobody says when: it never began."""
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        refused = {"reason": "UnexpectedAdmissionError", "message": "no healthy devices present"}
        cluster.add_pod("a", "Failed", "", code=None, lived="09:00-", status=refused)
        cluster.add_pod("a", "Failed", "its peer is gone", code=other, index=1, lived="09:00-10:02")
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (None, "UnexpectedAdmissionError: no healthy devices present")


def test_a_pod_that_had_done_its_work_is_no_reason(tmp_path: Path) -> None:
    """Its node was drained afterwards."""
    with serving_stand_in(tmp_path) as (cluster, kubeconfig):
        drained = {"conditions": [_disrupted("10:00")]}
        cluster.add_pod("a", "Succeeded", "done", code=0, lived="09:00-09:50", status=drained)
        cluster.add_pod("a", "Failed", "a fault", code=HUNG, index=1, lived="09:00-10:02")
        words = KubernetesApi(NAMESPACE, kubeconfig=kubeconfig, timeout_s=10.0).last_words("Job", "a", 20)
    assert (words.exit_code, words.said) == (HUNG, "a fault")
