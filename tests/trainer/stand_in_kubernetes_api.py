"""A stand-in for a cluster, since none can run here: an API server over a real socket that checks what it is given.

Jobs are checked as the real schema says (`kubernetes-validate`, strict), TrainJobs by Kubeflow's own types. It runs nothing
by itself: a test says what becomes of a Job, or has it run a Job's own command as a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

KUBERNETES = "1.35"
NAMESPACE = "training"
TOKEN = "a token of the stand-in"
_PATH = re.compile(r"/(?:api|apis/[\w.]+)/\w+/namespaces/training/(\w+)(?:/([\w.-]+))?(/log)?")
_NOW = "2026-01-02T03:04:05Z"


def invalid(manifest: Mapping[str, Any]) -> str:
    """Why the real API server would refuse it; empty: it would not."""
    if manifest["kind"] == "TrainJob":
        spec = {name: value for name, value in manifest.items() if name in ("metadata", "spec")}
        known = TrainerV1alpha1TrainJob.from_dict(dict(manifest))
        assert known is not None
        lost = _lost({"metadata": spec["metadata"], "spec": spec["spec"]}, json.loads(json.dumps(known.to_dict())))
        return f"unknown field {lost}" if lost else ""
    try:
        kubernetes_validate.validate(dict(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


def _lost(given: Any, kept: Any, place: str = "") -> str:
    """The first part of a document that its types know nothing of; empty: they know all of it."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            if not isinstance(kept, Mapping) or name not in kept:
                return f"{place}.{name}"
            if lost := _lost(value, kept[name], f"{place}.{name}"):
                return lost
    elif isinstance(given, list):
        for i, (value, other) in enumerate(zip(given, kept, strict=True)):
            if lost := _lost(value, other, f"{place}[{i}]"):
                return lost
    return ""


class StandInKubernetesApi:
    """What is in the cluster, by kind (in the plural) and name."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {
            kind: {} for kind in ("jobs", "services", "trainjobs", "pods")
        }
        self.logs: dict[str, str] = {}
        self.deleted: list[tuple[str, str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.is_away = False
        """Whether every answer is 503."""
        self.refusals: list[tuple[int, str]] = []
        """Answers to the next creations of Jobs."""
        self.refused: dict[str, int] = {}
        """Answers to every creation of a kind."""

    def set_status(self, kind: str, name: str, **status: Any) -> None:
        """What a controller would say of a Job."""
        with self.lock:
            self.objects[kind][name]["status"] = status

    def add_pod(
        self,
        job: str,
        phase: str,
        log: str,
        *,
        code: int | None,
        index: int = 0,
        lived: str = "",
        reason: str = "Error",
        status: Mapping[str, Any] | None = None,
    ) -> None:
        """A pod of a Job, what it said, and the status that its container ended with (None: it has not begun).

        `lived`: from when to when, "HH:MM-HH:MM"; with a "!" behind it the pod was ended because its Job had failed.
        `status`: what the cluster says of the pod besides.
        """
        began, ended = (f"2026-01-02T{time}:00Z" if time else None for time in lived.strip("!").partition("-")[::2])
        with self.lock:
            name = f"{job}-{index}-{len(self.objects['pods'])}"
            container = {"name": "node", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
            container |= {"state": {"terminated": {"exitCode": code, "reason": reason, "finishedAt": ended}}}
            self.objects["pods"][name] = {
                "metadata": {
                    "name": name,
                    "labels": {"batch.kubernetes.io/job-name": job},
                    "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
                    "creationTimestamp": began,
                    "deletionTimestamp": ended if lived.endswith("!") else None,
                },
                "status": {"phase": phase, "containerStatuses": [] if code is None else [container], **(status or {})},
            }
            self.logs[name] = log

    def run_job(self, name: str, root: Path) -> int:
        """Run the command of a Job's container here, as its only pod would, and say how it ended."""
        job = self.objects["jobs"][name]
        container = job["spec"]["template"]["spec"]["containers"][0]
        self.set_status("jobs", name, active=1, ready=1)
        command = [sys.executable if part == "python" else part for part in container["command"]]
        given = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
        environment = os.environ | given | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ports = [f"0.0.0.0:{port['containerPort']}" for port in container["ports"]]  # a pod has an address of its own
        arguments = [arg.replace(place, "127.0.0.1:0") for arg in container["args"] for place in ports]
        done = subprocess.run([*command, *arguments], cwd=root, env=environment, capture_output=True, text=True)
        phase = "Failed" if done.returncode else "Succeeded"
        self.add_pod(name, phase, done.stdout + done.stderr, code=done.returncode)
        condition = {"type": "Failed" if done.returncode else "Complete", "status": "True", "lastTransitionTime": _NOW}
        self.set_status("jobs", name, conditions=[condition | {"reason": "PodFailurePolicy"}])
        return done.returncode

    # What the handler asks.

    def create(self, kind: str, manifest: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer to POST."""
        if self.refusals and kind == "jobs":
            return self._error(*self.refusals.pop(0))
        name = manifest["metadata"]["name"]
        if kind in self.refused:
            return self._error(self.refused[kind], f"no {kind} now")
        if name in self.objects[kind]:
            return self._error(409, f'{kind} "{name}" already exists')
        if reason := invalid(manifest):
            return self._error(422, reason)
        manifest["metadata"]["uid"] = str(uuid.uuid4())
        self.objects[kind][name] = manifest
        return 201, manifest

    def read(self, kind: str, name: str) -> tuple[int, dict[str, Any]]:
        """Answer to GET of one."""
        found = self.objects[kind].get(name)
        return (200, found) if found is not None else self._error(404, f'{kind} "{name}" not found')

    def list(self, kind: str, selector: str) -> tuple[int, dict[str, Any]]:
        """Answer to GET of all that a label selects."""
        label, _, value = selector.partition("=")
        found = [o for o in self.objects[kind].values() if o["metadata"].get("labels", {}).get(label) == value]
        return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found}

    def delete(self, kind: str, name: str, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer to DELETE: a finalizer holds it until `finish_deletion`."""
        code, found = self.read(kind, name)
        if code == 200:
            self.deleted.append((kind, name, options))
            found["metadata"]["deletionTimestamp"] = _NOW
        return code, found

    def finish_deletion(self, kind: str, name: str) -> None:
        """Its pods have ended: it is gone."""
        with self.lock:
            del self.objects[kind][name]

    def _error(self, code: int, message: str) -> tuple[int, dict[str, Any]]:
        return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


class _Handler(BaseHTTPRequestHandler):
    cluster: StandInKubernetesApi

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        path, _, query = self.path.partition("?")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        found = _PATH.fullmatch(path)
        with self.cluster.lock:
            if self.cluster.is_away or found is None:
                return self._send(503 if self.cluster.is_away else 404, b"{}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, b'{"message": "Unauthorized"}')
            kind, name, log = found.groups()
            if log:
                return self._send(200, self.cluster.logs[name].encode(), "text/plain")
            selector = dict(part.split("=", 1) for part in query.split("&") if "=" in part).get("labelSelector", "")
            selector = selector.replace("%2F", "/").replace("%3D", "=")
            match method:
                case "POST":
                    code, answer = self.cluster.create(kind, body)
                case "GET":
                    code, answer = self.cluster.read(kind, name) if name else self.cluster.list(kind, selector)
                case _ if name:
                    code, answer = self.cluster.delete(kind, name, body)
                case _:
                    self.cluster.deleted.append((kind, selector, body))
                    code, answer = self.cluster.list(kind, selector)
            answer = json.dumps(answer).encode()
        return self._send(code, answer)

    def _send(self, code: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@contextmanager
def serving_stand_in(folder: Path) -> Iterator[tuple[StandInKubernetesApi, Path]]:
    """A running stand-in, and the kubeconfig file that leads to it."""
    cluster = StandInKubernetesApi()
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {"token": TOKEN}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    try:
        yield cluster, kubeconfig
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
