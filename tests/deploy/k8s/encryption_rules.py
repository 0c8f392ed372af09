"""Rules about TLS: both ends of a connection speak it or neither does, probes speak it, and the files are mounted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath
from typing import Any

from deploy.k8s import triton_canary
from tests.deploy.k8s.rendering import (
    Manifest,
    Manifests,
    Pod,
    environment,
    of_kind,
    pods,
    selects,
    train_job_pods,
)
from tests.deploy.k8s.workload_rules import CANARY, SETTINGS, settings_of

OF_A_CERTIFICATE = ("tls.crt", "tls.key", "ca.crt")
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
SAID_NAME = "localhost"  # which certificates bear for probes
_FILE = re.compile(r"/etc/reimagen/[\w./-]+")


def mounted(manifests: Manifests) -> Iterator[str]:
    """Every file of a Secret that a container is told of is in one that is mounted there."""
    for pod in chain(pods(manifests), train_job_pods(manifests)):
        files = {v["name"]: set(_files(v["secret"])) for v in pod.spec.get("volumes", ()) if "secret" in v}
        for container in pod.containers:
            there = {
                str(PurePath(mount["mountPath"]) / file)
                for mount in container.get("volumeMounts", ())
                for file in files.get(mount["name"], ())
            }
            told = set(_FILE.findall("\n".join(_words(container, manifests))))
            yield from (f"{pod.owner}: {container['name']} has no {path}" for path in sorted(told - there))


def encrypted(manifests: Manifests) -> Iterator[str]:
    """What listens with TLS is asked with it: by its callers, by its probes, and through its Service."""
    told = {
        pod.name: settings_of(pod.containers[0], manifests)
        for pod in pods(manifests)
        if tuple(pod.containers[0].get("command", ())) in SETTINGS
    }
    generator = told["generator"]
    if bool(generator.retrieval_tls()) != bool(told["retrieval"].tls_certificate_file):
        yield "Deployment/generator: it and retrieval do not speak the same"
    for pod in pods(manifests):
        verbosity = environment(pod.containers[0], manifests).get("GRPC_VERBOSITY")
        if pod.name == "generator" and generator.triton_tls() and verbosity != "ERROR":
            yield f"{pod.owner}: gRPC would write each handshake that fails"
        container = pod.spec["containers"][0]
        if container.get("command") == ["tritonserver"]:
            is_tls = any(word == "--grpc-use-ssl=true" for word in container["args"])
            yield from (f"{pod.owner}: {fault}" for fault in _faults_of_triton(container, generator, is_tls=is_tls))
        elif pod.name in told:
            is_tls = bool(told[pod.name].tls_certificate_file)
        else:
            continue
        yield from (
            f"{pod.owner}: {kind} is Kubernetes' own, which knows no TLS"
            for kind in PROBES
            if is_tls and "grpc" in container.get(kind, {})
        )
        for protocol in _protocols(pod, manifests):
            if (protocol == "kubernetes.io/h2c") == is_tls:
                yield f"{pod.owner}: its Service says {protocol}"


def _faults_of_triton(container: Manifest, generator: Any, *, is_tls: bool) -> Iterator[str]:
    """What is wrong between a Triton and whoever asks it."""
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in container["args"])
    is_mutual = flags.get("grpc-use-ssl-mutual") == "true"
    needed = ["server-cert", "server-key"] * is_tls + ["root-cert"] * is_mutual
    yield from (f"--grpc-{name} is missing" for name in needed if f"grpc-{name}" not in flags)
    if is_mutual and not is_tls:
        yield "mutual TLS, and no TLS"
    tls = generator.triton_tls()
    if bool(tls) != is_tls:
        yield f"TLS: {is_tls}; the generator's: {bool(tls)}"
    if is_mutual and not (tls and tls.certificate):
        yield "it asks for a certificate, and the generator has none"
    for kind in PROBES:
        command = container.get(kind, {}).get("exec", {}).get("command", ())
        if CANARY in command:
            asked = triton_canary.parser().parse_args(command[3:])
            if bool(asked.tls_ca_file) != is_tls or (
                is_mutual and not (asked.tls_certificate_file and asked.tls_key_file)
            ):
                yield f"{kind} is refused"
            if is_tls and asked.address.rpartition(":")[0] != SAID_NAME:
                yield f"{kind} asks by another name than {SAID_NAME}"


def _protocols(pod: Pod, manifests: Manifests) -> Iterator[str | None]:
    """What Services say of its port for calls."""
    for service in of_kind(manifests, "Service"):
        if selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
            yield from (port.get("appProtocol") for port in service["spec"]["ports"] if port["name"] == "grpc")


def _files(secret: Manifest) -> Iterator[str]:
    """The files of a Secret's volume."""
    yield from (item["path"] for item in secret["items"]) if "items" in secret else OF_A_CERTIFICATE


def _words(container: Manifest, manifests: Manifests) -> Iterator[str]:
    """All that a container's processes are told."""
    yield from (*container.get("command", ()), *container.get("args", ()))
    yield from environment(container, manifests).values()
    for kind in PROBES:
        yield from container.get(kind, {}).get("exec", {}).get("command", ())
