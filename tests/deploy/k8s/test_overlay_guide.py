"""The overlay of the guide (deploy/k8s/overlays/README.md) renders as it is printed there, and does what the guide says."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from tests.deploy.k8s import schema_rules
from tests.deploy.k8s.rendering import KUBECTL, MANIFESTS, Manifests, kustomize, named, of_kind

GUIDE = MANIFESTS / "overlays" / "README.md"
FILES = ("kustomization.yaml", "prometheus.yaml", "qdrant-of-others/kustomization.yaml", "pod.yaml")
ELSEWHERE = "http://prometheus-operated.observability:9090"


@cache
def printed() -> dict[str, str]:
    """The guide's files by name, in its order."""
    texts = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    return dict(zip(FILES, texts, strict=True))


@cache
def _rendered(with_qdrant_of_others: bool) -> str:
    with TemporaryDirectory() as there:
        folder = Path(there).resolve()
        for name, text in printed().items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace("../gpu-ha", os.path.relpath(GUIDE.parent / "gpu-ha", folder)))
        if not with_qdrant_of_others:
            overlay = yaml.safe_load((folder / FILES[0]).read_text())
            del overlay["components"]
            (folder / FILES[0]).write_text(yaml.safe_dump(overlay))
        return json.dumps(kustomize(folder))


def ours(*, with_qdrant_of_others: bool) -> Manifests:
    """The overlay, with or without its component."""
    return json.loads(_rendered(with_qdrant_of_others))


def test_every_volume_has_its_class_and_no_set_number_contradicts_keda() -> None:
    manifests = ours(with_qdrant_of_others=False)
    assert {claim["spec"]["storageClassName"] for claim in of_kind(manifests, "PersistentVolumeClaim")} == {
        "shared-files"
    }
    templates = named(manifests, "StatefulSet", "qdrant")["spec"]["volumeClaimTemplates"]
    volumes = named(manifests, "Deployment", "retrieval")["spec"]["template"]["spec"]["volumes"]
    templates += [volume["ephemeral"]["volumeClaimTemplate"] for volume in volumes if "ephemeral" in volume]
    assert [template["spec"].get("storageClassName") for template in templates] == ["fast"] * 3
    scaled = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in of_kind(manifests, "ScaledObject")}
    assert (scaled["triton-unet-1024"]["minReplicaCount"], scaled["triton-unet-1024"]["maxReplicaCount"]) == (2, 6)
    assert not [name for name in scaled if "replicas" in named(manifests, "Deployment", name)["spec"]]


def test_prometheus_of_another_namespace_is_asked_and_let_in() -> None:
    manifests = ours(with_qdrant_of_others=False)
    triggers = [trigger for each in of_kind(manifests, "ScaledObject") for trigger in each["spec"]["triggers"]]
    asked = [trigger["metadata"]["serverAddress"] for trigger in triggers if trigger["type"] == "prometheus"]
    assert len(asked) == 6 and set(asked) == {ELSEWHERE}
    for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"):
        labels = [each["metadata"]["labels"] for each in of_kind(manifests, kind)]
        assert labels and all(label["release"] == "kube-prometheus-stack" for label in labels)
    opened: set[int] = set()
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            if (
                "app.kubernetes.io/name: prometheus" in yaml.safe_dump(rule)
                and policy["metadata"]["name"] != "prometheus"
            ):
                opened |= {port["port"] for port in rule["ports"]}
    (rule,) = named(manifests, "NetworkPolicy", "prometheus")["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == opened


def test_with_a_qdrant_of_others_nothing_of_ours_is_left_and_retrieval_reaches_theirs() -> None:
    manifests = ours(with_qdrant_of_others=True)
    left = {each["kind"] for each in manifests if each["metadata"]["name"].startswith("qdrant")}
    assert left == {"PrometheusRule"}, "whose metrics are theirs"
    (settings,) = (m for m in of_kind(manifests, "ConfigMap") if m["metadata"]["name"].startswith("retrieval-settings"))
    assert settings["data"]["REIMAGEN_RETRIEVAL_QDRANT_URL"] == "https://qdrant.data:6334"
    (egress,) = named(manifests, "NetworkPolicy", "retrieval")["spec"]["egress"]
    assert "data" in egress["to"][0]["namespaceSelector"]["matchLabels"].values() and egress["ports"][0]["port"] == 6334


def test_what_is_printed_is_by_the_schema_and_the_pod_is_let_in() -> None:
    pod = yaml.safe_load(printed()["pod.yaml"])
    manifests = ours(with_qdrant_of_others=True)
    assert [*schema_rules.schema([*manifests, pod]), *schema_rules.restricted(manifests)] == []
    template = {"metadata": {"labels": {}}, "spec": {**pod["spec"], "restartPolicy": "Never"}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": pod["metadata"], "spec": {"template": template}}
    assert list(schema_rules.restricted([*of_kind(manifests, "Namespace"), job])) == []


def api_keys(document: object) -> Iterator[str]:
    """The keys of the Secret `api-keys` that anything in a document names: volumes by items, variables and monitors by one."""
    if isinstance(document, dict):
        if document.get("secretName") == "api-keys":
            yield from (item["key"] for item in document["items"])
        elif document.get("name") == "api-keys" and "key" in document:
            yield document["key"]
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from api_keys(value)


def test_the_secret_made_by_hand_has_every_key_that_pods_look_for(tmp_path: Path) -> None:
    """The guide's commands as printed, but that the Secrets are shown instead of made."""
    (script,) = re.findall(r"^```sh\n(for name in .*?)^```$", (MANIFESTS / "README.md").read_text(), re.M | re.S)
    for name in ("retrieval.crt", "retrieval.key", "ca.crt"):
        (tmp_path / name).touch()
    script = script.replace("kubectl ", f"{KUBECTL} ").replace(
        " create secret ", " create secret --dry-run=client -o yaml "
    )
    script = script.replace(f"\n{KUBECTL}", f"\necho ---\n{KUBECTL}")
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {each["metadata"]["name"]: each["data"] for each in yaml.safe_load_all(done.stdout) if each}
    keys = [base64.b64decode(value) for value in made["api-keys"].values()]
    assert all(re.fullmatch(rb"[0-9a-f]{64}", key) for key in keys), "none ends with a newline"
    assert set(made["api-keys"]) == set(api_keys(ours(with_qdrant_of_others=False)))
    assert set(made["retrieval-tls"]) == {"tls.crt", "tls.key", "ca.crt"}
