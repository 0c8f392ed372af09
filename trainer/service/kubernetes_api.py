"""The cluster's API server, as far as runs need it; the only file that knows its client."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import urllib3
import yaml
from kubernetes import client, config

from common.service.config import ConfigError
from trainer.endings import CAUSES, most_telling
from trainer.service.executor import ExecutorAway, ExecutorError

T = TypeVar("T")
Kind = Literal["Job", "TrainJob"]

_TRAIN_JOBS = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
MAX_LOG_BYTES = 1 << 20  # read of a pod's last lines, however long they are
MAX_SAID = 4096  # characters of them that are kept
_NOT_FOUND, _CONFLICT = 404, 409
_KILLED = 128 + 9
_LATER = (401, 408, 429)  # beside 5xx: a token is being renewed, the server is busy
_UNREADABLE = (config.ConfigException, OSError, yaml.YAMLError, TypeError, KeyError, ValueError)  # as its client has it
_JOB_NAME = "batch.kubernetes.io/job-name"
_INDEX = "batch.kubernetes.io/job-completion-index"
_TRAIN_JOB_NAME = "jobset.sigs.k8s.io/jobset-name"


@dataclass(frozen=True, kw_only=True)
class LastWords:
    """How the pods of a Job's newest attempt ended.

    Attributes:
        exit_code: the status, not 0, of the container that tells most (see `most_telling`); None: it is not known any more.
        said: its last lines, after why the cluster ended it (e.g. OOMKilled, or Evicted and what it says of that) where it did.
    """

    exit_code: int | None
    said: str


class KubernetesApi:
    """One namespace of one cluster. Everything raises ExecutorAway where the API server does not answer."""

    def __init__(self, namespace: str, *, kubeconfig: Path | None, timeout_s: float) -> None:
        """Reads how the cluster is reached: a kubeconfig, or (None) what a pod is given by its own.

        Raises:
            ConfigError: that cannot be read.
        """
        configuration = client.Configuration()
        try:
            if kubeconfig:
                config.load_kube_config(str(kubeconfig), client_configuration=configuration)
            else:
                config.load_incluster_config(client_configuration=configuration)
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--kubernetes-config: {kubeconfig or 'that of the pod'}: {reason}") from None
        configuration.retries = urllib3.Retry(0)  # the service asks again by itself
        self._api = client.ApiClient(configuration)
        self._batch = client.BatchV1Api(self._api)
        self._core = client.CoreV1Api(self._api)
        self._custom = client.CustomObjectsApi(self._api)
        self._namespace = namespace
        self._timeout_s = timeout_s

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create a Job, TrainJob or Service; gives what there is then, somebody else's of that name too.

        Raises:
            ExecutorError: it is refused.
        """
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        create: dict[str, Callable[..., Any]] = {
            "Job": self._batch.create_namespaced_job,
            "Service": self._core.create_namespaced_service,
            "TrainJob": lambda namespace, body, **rest: self._custom.create_namespaced_custom_object(
                **_TRAIN_JOBS, namespace=namespace, body=body, **rest
            ),
        }
        try:
            return self._plain(self._call(create[kind], self._namespace, manifest))
        except client.ApiException as error:
            if error.status != _CONFLICT:
                raise ExecutorError(f"{kind} {name} is refused: {_said(error)}") from None
        return manifest if kind == "Service" else self.read(kind, name) or manifest

    def read(self, kind: Kind, name: str) -> dict[str, Any] | None:
        """A Job or TrainJob; None: there is none.

        Raises:
            ExecutorAway: we may not read it.
        """
        try:
            if kind == "Job":
                return self._plain(self._call(self._batch.read_namespaced_job, name, self._namespace))
            read = self._custom.get_namespaced_custom_object
            return self._plain(self._call(read, **_TRAIN_JOBS, namespace=self._namespace, name=name))
        except client.ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise ExecutorAway(f"{kind} {name} cannot be read: {_said(error)}") from None

    def delete(self, kind: Kind, name: str) -> None:
        """Delete a Job or TrainJob with its pods, which get their time to end; one that is gone is no error."""
        options = client.V1DeleteOptions(propagation_policy="Foreground")
        try:
            if kind == "Job":
                self._call(self._batch.delete_namespaced_job, name, self._namespace, body=options)
            else:
                delete = self._custom.delete_namespaced_custom_object
                self._call(delete, **_TRAIN_JOBS, namespace=self._namespace, name=name, body=options)
        except client.ApiException as error:
            if error.status != _NOT_FOUND:
                raise ExecutorAway(f"{kind} {name} cannot be deleted: {_said(error)}") from None

    def kill_pods(self, kind: Kind, name: str) -> None:
        """End the pods of a Job or TrainJob at once."""
        try:
            self._call(
                self._core.delete_collection_namespaced_pod,
                self._namespace,
                label_selector=_selector(kind, name),
                grace_period_seconds=0,
            )
        except client.ApiException as error:
            raise ExecutorAway(f"the pods of {kind} {name} cannot be deleted: {_said(error)}") from None

    def last_words(self, kind: Kind, name: str, lines: int) -> LastWords:
        """How the newest attempt of a Job or TrainJob that failed ended: what the pod said last that tells most of it."""
        nothing = LastWords(exit_code=None, said="")
        try:
            pods: list[Any] = self._call(
                self._core.list_namespaced_pod, self._namespace, label_selector=_selector(kind, name)
            ).items
            if not pods:
                return nothing
            attempt = _of_newest_attempt(pods)
            failed = [pod for pod in attempt if _has_failed(pod)] or attempt
            pod = _most_telling(sorted(failed, key=_fell_s))
            nothing = LastWords(exit_code=_exit_code(pod), said=_ended_by(pod))
            read = self._core.read_namespaced_pod_log
            log = self._call(read, pod.metadata.name, self._namespace, tail_lines=lines, limit_bytes=MAX_LOG_BYTES)
        except (client.ApiException, ExecutorAway):
            return nothing
        said = (nothing.said, str(log).strip()[-MAX_SAID:])
        return LastWords(exit_code=nothing.exit_code, said="\n".join(filter(None, said)))

    def _call(self, method: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return method(*arguments, **named, _request_timeout=self._timeout_s)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise ExecutorAway(f"the cluster does not answer: {type(reason).__name__}") from None
        except client.ApiException as error:
            if error.status in _LATER or not error.status or error.status >= 500:
                raise ExecutorAway(f"the cluster does not answer: {_said(error)}") from None
            raise

    def _plain(self, answer: Any) -> dict[str, Any]:
        plain: Any = self._api.sanitize_for_serialization(answer)
        return plain


def _of_newest_attempt(pods: Sequence[Any]) -> list[Any]:
    """Of each index of a Job the pod that was made last, where it lived when the last of them was made.

    A pod that fails is kept, and another one made in its place: what it ended with is not why that one's attempt failed.
    Pods that have not begun when the Job ends tell nothing, unless the cluster has ended them before they did.
    """
    begun = [pod for pod in pods if _states(pod) or _taken(pod)] or pods
    newest = {_place(pod): pod for pod in sorted(begun, key=_made_s)}
    last = max(newest.values(), key=_made_s)
    return [pod for pod in newest.values() if pod is last or _ended_s(pod) >= _made_s(last)]


def _place(pod: Any) -> tuple[str | None, str | None]:
    """The Job, of which a TrainJob may have several, and the index in it; a Job that is not indexed has one pod at a time."""
    return (pod.metadata.labels or {}).get(_JOB_NAME), (pod.metadata.annotations or {}).get(_INDEX)


def _made_s(pod: Any) -> float:
    made = pod.metadata.creation_timestamp
    return made.timestamp() if made else 0.0


def _states(pod: Any) -> list[Any]:
    """States of those of a pod's containers that have begun."""
    found = [status.state for status in (pod.status and pod.status.container_statuses) or () if status.state]
    return [state for state in found if state.running or state.terminated]


def _ends(pod: Any) -> list[Any]:
    """How those of a pod's containers ended that failed."""
    return [state.terminated for state in _states(pod) if state.terminated and state.terminated.exit_code]


def _disruptions(pod: Any) -> list[Any]:
    """What the cluster says of a pod that it takes away: for one of more priority, from a node that is drained or lost."""
    conditions: list[Any] = (pod.status and pod.status.conditions) or []
    return [said for said in conditions if said.type == "DisruptionTarget" and said.status == "True"]


def _taken(pod: Any) -> str:
    """Why the cluster ended a pod, or let none of it begin, in one line; empty: it did not, or the pod had done its work."""
    if pod.status and pod.status.phase == "Succeeded":  # its node may be drained afterwards
        return ""
    for said in (pod.status, *_disruptions(pod)):
        if said and said.reason:
            return " ".join(": ".join(filter(None, (said.reason, said.message))).split())[:MAX_SAID]
    return ""


def _has_failed(pod: Any) -> bool:
    """Whether a pod failed by itself, or was taken by the cluster: not because its Job, which had failed, took it away."""
    has_failed = bool(pod.status and pod.status.phase == "Failed" and not pod.metadata.deletion_timestamp)
    return has_failed or bool(_taken(pod))


def _ended_s(pod: Any) -> float:
    """When the first of its containers failed, or else the cluster took it; infinity: that is not said."""
    return min(_failed_s(pod) or _taken_s(pod), default=math.inf)


def _fell_s(pod: Any) -> float:
    """From when on others lacked a pod: one that is taken away may save its state for a while; one that its node refused never
    was there. Infinity: that is not said."""
    refused = [_made_s(pod)] if _taken(pod) and not _states(pod) else []
    return min([*_failed_s(pod), *_taken_s(pod)] or refused, default=math.inf)


def _failed_s(pod: Any) -> list[float]:
    return [end.finished_at.timestamp() for end in _ends(pod) if end.finished_at]


def _taken_s(pod: Any) -> list[float]:
    return [said.last_transition_time.timestamp() for said in _disruptions(pod) if said.last_transition_time]


def _exit_code(pod: Any) -> int | None:
    """The first status that is not 0 of a pod's containers; None: there is none yet."""
    return next((end.exit_code for end in _ends(pod)), None)


def _most_telling(first_to_fall: Sequence[Any]) -> Any:
    """Of pods, in the order in which they fell, the one that says why. One that the cluster took counts as killed, unless its
    status says something else of its own."""
    codes = [
        _KILLED if _taken(pod) and _exit_code(pod) not in CAUSES else _exit_code(pod) or 0 for pod in first_to_fall
    ]
    failed = [code for code in codes if code]
    return first_to_fall[codes.index(most_telling(failed) if failed else 0)]


def _ended_by(pod: Any) -> str:
    """Why the cluster ended a pod or its container, where it says so: its log knows nothing of it."""
    return _taken(pod) or next((str(end.reason) for end in _ends(pod) if end.reason not in (None, "Error")), "")


def _selector(kind: Kind, name: str) -> str:
    return f"{_JOB_NAME if kind == 'Job' else _TRAIN_JOB_NAME}={name}"


def _said(error: client.ApiException) -> str:
    """What the server says of an error, in one line."""
    try:
        return f"{error.status} {json.loads(error.body or '')['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}"
