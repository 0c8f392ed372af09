"""The rule about admission: a policy of signatures asks for one of every image of the stack, and nothing passes without."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.deploy.k8s.rendering import Manifest, Manifests, of_kind, pods

OF_CONTAINERS = {"containers", "initContainers"}  # lists that Kyverno makes of a pod by itself
VERIFIED = re.compile(
    r"images\.(\w+)\.map\((\w+), verifyImageSignatures\(\2, \[attestors\.(\w+)\]\)\)\.all\((\w+), \4 > 0\)"
)


def signatures(manifests: Manifests) -> Iterator[str]:
    """Where there is a policy, it denies; every image is one that it asks about, whatever list of a pod it is in."""
    for policy in of_kind(manifests, "NamespacedImageValidatingPolicy"):
        name, spec = policy["metadata"]["name"], policy["spec"]
        yield from (f"{name}: {fault}" for fault in _faults(spec))
        patterns = [
            re.escape(each.get("glob", "")).replace(r"\*", ".*") for each in spec.get("matchImageReferences", ())
        ]
        for pod in pods(manifests):
            volumes = (v["image"]["reference"] for v in pod.spec.get("volumes", ()) if "image" in v)
            for image in [*(container["image"] for container in pod.containers), *volumes]:
                if not any(re.fullmatch(pattern, image) for pattern in patterns):
                    yield f"{name}: asks nothing of {image} ({pod.owner})"


def _faults(spec: Manifest) -> Iterator[str]:
    if spec.get("validationActions") != ["Deny"] or spec.get("failurePolicy") != "Fail":
        yield "does not deny"
    settings = spec.get("validationConfigurations", {})
    if not settings.get("required") or not settings.get("verifyDigest"):
        yield f"takes images that nobody has looked at: {settings}"
    (rule,) = spec["matchConstraints"]["resourceRules"]
    if rule["resources"] != ["pods"] or not {"CREATE", "UPDATE"} <= set(rule["operations"]):
        yield f"is not asked about pods: {rule}"
    attestors = {each["name"] for each in spec["attestors"]}
    for attestor in spec["attestors"]:
        if not attestor["cosign"]["key"].get("data", "").startswith("-----BEGIN PUBLIC KEY-----"):
            yield f"{attestor['name']} has no public key"
    verified = {
        found[1]
        for each in spec["validations"]
        if (found := VERIFIED.fullmatch(each["expression"])) and found[3] in attestors
    }
    extracted = {each["name"]: each["expression"] for each in spec.get("images", ())}
    if not any(".image.reference" in expression for expression in extracted.values()):
        yield "finds no image volumes"
    if missing := (OF_CONTAINERS | extracted.keys()) - verified:
        yield f"verifies no signature of {sorted(missing)}"
