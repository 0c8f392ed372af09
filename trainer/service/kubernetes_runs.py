"""Runs as Jobs or TrainJobs of a cluster, whose controllers keep them going."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from trainer.service.commands import fit_arguments
from trainer.service.executor import ExecutorAway, ExecutorError, Observed, Phase
from trainer.service.kubernetes_api import MAX_SAID, Kind, KubernetesApi
from trainer.service.kubernetes_manifests import (
    TOKEN,
    Cluster,
    job_manifest,
    job_name,
    service_manifest,
    train_job_manifest,
)
from trainer.service.run_record import RunRecord
from trainer.service.spec_rules import Folders

LAST_LINES = 20
_GOOD, _BAD = "Complete", "Failed"  # conditions, TrainJob's too


class KubernetesRuns:
    """Runs of one kind of Job. How many there are at once is the cluster's affair."""

    max_runs = 0

    def __init__(self, kind: Kind, api: KubernetesApi, cluster: Cluster, folders: Folders) -> None:
        self._kind: Kind = kind
        self._api = api
        self._cluster = cluster
        self._folders = folders
        self._findable: set[str] = set()  # tokens of attempts whose pods find one another

    def launch(self, record: RunRecord) -> None:
        """See `Executor`."""
        arguments = fit_arguments(record.name, record.spec, self._folders)
        render = job_manifest if self._kind == "Job" else train_job_manifest
        made = self._api.create(render(record, arguments, self._cluster))
        self._check_ours(made, record)
        self._make_findable(made, record)

    def observe(self, record: RunRecord) -> Observed:
        """See `Executor`."""
        job = self._api.read(self._kind, job_name(record))
        if job is None:
            return Observed(phase=Phase.ABSENT)
        place = f"{self._kind.lower()}/{job_name(record)}"
        if not _is_ours(job, record):
            if _is_going(job):  # of a run of that name that was deleted
                return Observed(phase=Phase.ABSENT)
            return Observed(phase=Phase.OVER, place=place, error=f"{place} is somebody else's")
        conditions = {
            said["type"]: said for said in job.get("status", {}).get("conditions", ()) if said["status"] == "True"
        }
        for name in (_BAD, _GOOD):
            if name in conditions:
                return self._over(record, place, conditions[name], succeeded=name == _GOOD)
        if _at_work(job.get("status", {})):
            return Observed(phase=Phase.RUNNING, place=place)
        if record.cancel_asked_s is None:  # one that is to end needs no name
            self._make_findable(job, record)  # a service that ended in the middle of `launch` had not
        return Observed(phase=Phase.WAITING, place=place, status="no pod is ready")

    def stop(self, record: RunRecord) -> bool:
        """See `Executor`."""
        self._api.delete(self._kind, job_name(record))
        return True

    def kill(self, record: RunRecord) -> None:
        """See `Executor`."""
        self._api.kill_pods(self._kind, job_name(record))

    def remove(self, record: RunRecord) -> None:
        """See `Executor`."""
        for attempt in record.attempts():
            job = self._api.read(self._kind, job_name(attempt))
            if job is not None and _is_ours(job, attempt):
                self._api.delete(self._kind, job_name(attempt))

    def _over(self, record: RunRecord, place: str, condition: Mapping[str, Any], *, succeeded: bool) -> Observed:
        over = Observed(phase=Phase.OVER, place=place, succeeded=succeeded, ended_s=_time_s(condition))
        if succeeded:
            return over
        reason = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
        reason = reason[:MAX_SAID]
        last = self._api.last_words(self._kind, job_name(record), LAST_LINES)
        return replace(over, error="\n".join(filter(None, (reason, last.said))), exit_code=last.exit_code)

    def _make_findable(self, job: Mapping[str, Any], record: RunRecord) -> None:
        """Give a Job's pods the name of the first one, once; a TrainJob's runtime does.

        Raises:
            ExecutorError: it is refused; without it the Job would never train, so that it is deleted.
        """
        if self._kind == "Job" and record.spec.num_pods > 1 and record.token not in self._findable:
            try:
                self._api.create(service_manifest(record, self._cluster, job["metadata"]["uid"]))
            except ExecutorError:
                self.stop(record)
                raise
            self._findable.add(record.token)

    def _check_ours(self, job: Mapping[str, Any], record: RunRecord) -> None:
        if not _is_ours(job, record):
            if _is_going(job):
                raise ExecutorAway(f"{self._kind} {job_name(record)} of a run that was deleted is not gone yet")
            raise ExecutorError(f"there is a {self._kind} {job_name(record)} already, which is not of this run")


def _is_ours(job: Mapping[str, Any], record: RunRecord) -> bool:
    return (job["metadata"].get("annotations") or {}).get(TOKEN) == record.token


def _is_going(job: Mapping[str, Any]) -> bool:
    return bool(job["metadata"].get("deletionTimestamp"))


def _at_work(status: Mapping[str, Any]) -> int:
    """Pods that are ready: a Job says so of itself, a TrainJob of its jobs."""
    return (status.get("ready") or 0) + sum(job.get("ready") or 0 for job in status.get("jobsStatus") or ())


def _time_s(condition: Mapping[str, Any]) -> float | None:
    said = condition.get("lastTransitionTime")
    return datetime.fromisoformat(said).timestamp() if said else None
