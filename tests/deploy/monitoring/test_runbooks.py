"""What the runbooks have somebody type at night: commands that exist, for ports, Secrets and containers that are there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from functools import cache

import pytest
from qdrant_client import models

from client.__main__ import _parser as client_parser
from deploy.local.children import ROOT
from tests.deploy.k8s.rendering import KUBECTL, named, pods, stack
from trainer.service.kubernetes_manifests import CONTAINER

PAGE = (ROOT / "deploy" / "monitoring" / "runbooks.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S))
SPANS = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S))
SAID = [*BLOCKS.splitlines(), *(span.replace("\n", " ") for span in SPANS)]


@cache
def flags_of(*verbs: str) -> set[str]:
    """What kubectl says that a command takes."""
    done = subprocess.run([str(KUBECTL), *verbs, "--help"], capture_output=True, text=True, timeout=30, check=True)
    return set(re.findall(r"(?<=\s)--?[a-zA-Z][\w-]*", done.stdout)) | {"-n"}


def test_kubectl_takes_what_it_is_told() -> None:
    assert KUBECTL.is_file(), f"{KUBECTL} is not there; run `make kubectl`"
    asked = 0
    for line in SAID:
        if not re.match(r"(?:k|kubectl) (?:-n \S+ )?[a-z]", line):
            continue
        words = shlex.split(line, comments=True)
        words = words[: words.index("|")] if "|" in words else words
        words = words[3:] if words[1] == "-n" else words[1:]
        verbs = words[:2] if words[0] in ("set", "rollout", "create") else words[:1]
        own = words[: words.index("--")] if "--" in words else words
        flags = {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)}
        known = flags_of(*verbs)
        assert {"-it" if flag in ("-i", "-t") else flag for flag in flags} - {"-it"} <= known, line
        asked += 1
    assert asked > 20


def test_nobody_is_asked_to_run_what_an_image_has_not() -> None:
    """No shell, no curl: `k exec` is for the pod that brings both."""
    assert set(re.findall(r"\bk exec\b(?: -it)? (\S+)", PAGE)) == {"files"}
    guide = (ROOT / "deploy" / "k8s" / "overlays" / "README.md").read_text()
    assert "## Files onto a volume" in guide and "\n  name: files\n" in guide


def test_reimagen_takes_what_it_is_told() -> None:
    told = [shlex.split(line, comments=True)[1:] for line in SAID if re.match(r"reimagen (?:kb|train) \w", line)]
    assert len(told) > 6
    for words in told:
        client_parser({}).parse_args(words)


def test_tunnels_lead_to_ports_that_are_there() -> None:
    ports = {
        (pod.name.split("-")[0], port["containerPort"])
        for pod in pods(stack("gpu"))
        for container in pod.containers
        for port in container.get("ports", ())
    }
    calls = re.findall(r"port-forward service/(\w+) (\d+)\s+# generator (\d+), trainer (\d+)", BLOCKS)
    metrics = re.findall(
        r"pod/POD (\d+)\s+# metrics of retrieval; generator (\d+), trainer (\d+), a run (\d+), Triton (\d+)", BLOCKS
    )
    (((name, *three)), five) = (*calls, metrics[0])
    assert name == "retrieval"
    assert {*zip(("retrieval", "generator", "trainer"), map(int, three), strict=True)} <= ports
    assert {*zip(("retrieval", "generator", "trainer", "train", "triton"), map(int, five), strict=True)} <= ports
    assert {("qdrant", int(port)) for port in re.findall(r"port-forward pod/qdrant-0 (\d+)", BLOCKS)} <= ports


def test_secrets_claims_and_containers_are_there() -> None:
    manifests = stack("gpu")
    secrets = [
        volume["secret"] for pod in pods(manifests) for volume in pod.spec.get("volumes", ()) if "secret" in volume
    ]
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for pod in pods(manifests)
        for container in pod.containers
        for variable in container.get("env", ())
        if "secretKeyRef" in variable.get("valueFrom", {})
    ]
    names = {secret["secretName"] for secret in secrets}
    keys = {item["key"] for secret in secrets for item in secret.get("items", ())} | {
        each["key"] for each in references
    }
    assert set(re.findall(r"get secret ([\w-]+)", BLOCKS)) <= names
    assert set(re.findall(r"\b(?:retrieval|trainer|generator|qdrant)-tls\b", BLOCKS)) <= names
    assert set(re.findall(r"\b(?:retrieval|trainer|generator)-admins\b|(?<=data\.)qdrant\b", BLOCKS)) <= keys
    claims = named(manifests, "StatefulSet", "qdrant")["spec"]["volumeClaimTemplates"]
    assert "`storage-qdrant-0`" in PAGE and "storage" in {claim["metadata"]["name"] for claim in claims}
    assert f"--target={CONTAINER} " in PAGE
    label = named(manifests, "Namespace", "reimagen")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert re.findall(r"enforce=(\w+) --overwrite", PAGE)[-1] == label, "as it was"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("drop_replica", models.DropReplicaOperation), ("replicate_shard", models.ReplicateShardOperation)],
)
def test_qdrant_is_asked_for_what_it_knows(name: str, kind: type) -> None:
    """By the models of its client; no server was asked."""
    (body,) = (each for each in re.findall(r"-d '(.*)'", BLOCKS) if name in each)
    kind(**json.loads(body))
