"""What the manifests and the rest of the house promise one another."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from client.__main__ import _parser as client_parser
from common.service.command import BAD_INPUT, FULL_DISK
from common.stages import STAGES
from deploy.k8s import model_store, snapshots, triton_canary
from deploy.local.tritonserver import RESTRICTED, SHM_BYTES, TritonTls
from generator_svc.export import ExportSettings
from generator_svc.stage_tensors import TEXT_ENCODER
from retrieval_svc.import_command import add_import_command
from tests.deploy.k8s.connections import FOLLOWED, NEVER_SET, OWN, connections
from tests.deploy.k8s.rendering import MANIFESTS, OPTIONS, OTHERWISE, OVERLAYS, environment, named, of_kind, pods, stack
from tests.deploy.k8s.schema_rules import CUSTOM
from tests.deploy.k8s.workload_rules import SETTINGS
from trainer.__main__ import main as train
from trainer.knn_command import add_corpus_flags, add_knn_flags

README = (MANIFESTS / "README.md").read_text()
PEER = re.compile(r"_(ADDRESS|ADDRESSES|URL|ENDPOINT|HOST)$")


def set_somewhere() -> set[str]:
    """The variables that some overlay gives to some container."""
    found: set[str] = set()
    for overlay in [*OVERLAYS, OTHERWISE]:
        manifests = stack(overlay)
        for pod in pods(manifests):
            for container in pod.containers:
                found |= set(environment(container, manifests))
    return found


def test_every_setting_is_set_or_the_readme_says_that_it_is_not() -> None:
    """The reverse of the rule `settings`."""
    known = {prefix + f.name.upper() for kind, prefix in SETTINGS.values() for f in fields(kind)}
    (section,) = re.findall(r"### Settings left alone\n(.*?)\n#", README, re.DOTALL)
    left = set(re.findall(r"`(REIMAGEN_\w+)`", section))
    assert known - set_somewhere() == left


def test_every_setting_that_names_a_peer_is_followed() -> None:
    """`connections.py` would miss a connection that a new setting opens."""
    known = {(prefix, f.name.upper()) for kind, prefix in SETTINGS.values() for f in fields(kind)}
    peers = {(prefix, name) for prefix, name in known if PEER.search("_" + name) and name not in OWN}
    never = {prefix + name for prefix, name in peers if name in NEVER_SET}
    assert {prefix + name for prefix, name in peers} - never == set(FOLLOWED)
    assert not never & set_somewhere()


def test_every_connection_is_a_row_of_the_readme() -> None:
    """By the workloads' names; both ways, over all overlays."""
    made = {
        (short(each.source), short(each.target), str(each.port))
        for overlay in [*OVERLAYS, OTHERWISE]
        for each in connections(stack(overlay))
        if each.target != "dns"
    }
    (section,) = re.findall(r"### Who talks to whom\n(.*?)\n#", README, re.DOTALL)
    rows = re.findall(r"^\| ([\w ,-]+) \| ([\w ,-]+) \| ([\d, ]+) \|", section, re.MULTILINE)
    told = {
        (source, target, port)
        for sources, targets, ports in rows
        for source in sources.split(", ")
        for target in targets.split(", ")
        for port in ports.split(", ")
    }
    assert made == told


def short(name: str) -> str:
    """A workload as the README calls it."""
    name = name.partition("/")[2] or name
    if name == "train" or name.startswith("reimagen-"):
        return "run"
    return "triton" if name.startswith("triton") else name


def test_every_secret_is_a_row_of_the_readme() -> None:
    """Each Secret that is referred to, with its keys; both ways."""
    used: set[tuple[str, str]] = set()
    for overlay in [*OVERLAYS, OTHERWISE]:
        for pod in pods(stack(overlay)):
            for volume in pod.spec.get("volumes", ()):
                if secret := volume.get("secret"):
                    keys = [item["key"] for item in secret.get("items", ())] or ["tls.crt", "tls.key", "ca.crt"]
                    used |= {(secret["secretName"], key) for key in keys}
            for container in pod.containers:
                references = [v["valueFrom"].get("secretKeyRef") for v in container.get("env", ()) if "valueFrom" in v]
                used |= {(each["name"], each["key"]) for each in references if each}
    (section,) = re.findall(r"### Secrets\n(.*?)\n#", README, re.DOTALL)
    told = {
        (name, key)
        for names, keys in re.findall(r"^\| (`.*?`) \| (`.*?`) \|", section, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", names)
        for key in re.findall(r"`(.+?)`", keys)
    }
    assert used == told


def test_the_job_that_trains_is_the_one_that_the_service_makes() -> None:
    manifests = stack("local-cpu")
    ours, theirs = (named(manifests, "Job", name)["spec"] for name in ("train", "reimagen-one-1"))
    del theirs["template"]["metadata"]["labels"]["app.kubernetes.io/instance"]
    ours["template"]["metadata"]["labels"].pop("app.kubernetes.io/part-of")
    (own,), (its) = (spec["template"]["spec"]["containers"] for spec in (ours, theirs))
    (its,) = its
    own["args"] = [argument.replace("/runs/first", "/runs/one") for argument in own["args"]]
    for container in (own, its):
        for amounts in container["resources"].values():
            amounts["memory"] = amounts["memory"].replace("16Gi", str(16 << 30))
    assert ours == theirs


def test_triton_is_started_as_on_one_machine() -> None:
    """deploy/local/tritonserver.py is what all tests of the generator run."""
    for pod in pods(stack("gpu-ha")):
        if not pod.name.startswith("triton"):
            continue
        arguments = pod.containers[0]["args"]
        for flag in ("shm-default-byte-size", "shm-growth-byte-size"):
            assert f"--backend-config=python,{flag}={SHM_BYTES}" in arguments
        assert f"--grpc-restricted-protocol={','.join(RESTRICTED)}:admin-key=$(POD_UID)" in arguments
        for flag in ("--allow-http=false", "--strict-readiness=true", "--disable-auto-complete-config"):
            assert flag in arguments
        ours = TritonTls(folder=Path("/etc/reimagen/tls")).arguments()
        assert {word for word in arguments if re.match("--grpc-(use-ssl|server-|root-)", word)} == set(ours)
        variables = environment(pod.containers[0], [])
        assert (variables["OMP_WAIT_POLICY"], variables["MALLOC_ARENA_MAX"]) == ("PASSIVE", "2")


def test_each_stage_has_a_group_and_each_group_its_models() -> None:
    """The base stage with the text encoder, each of the others by itself; the README says how they are exported."""
    groups = {pod.labels["app.kubernetes.io/component"] for pod in pods(stack("gpu-ha")) if "triton" in pod.name}
    names = [spec.name.replace("_", "-") for spec in STAGES]
    assert groups == {"base", *names[1:]}
    for models in (f"{STAGES[0].name},{TEXT_ENCODER}", *(spec.name for spec in STAGES[1:])):
        assert f"--models {models} " in README
        ExportSettings(weights=MANIFESTS, repository=MANIFESTS, models=models).chosen()
    addresses = {
        address.partition(":")[0]
        for address in environment(_container("gpu-ha", "generator"), stack("gpu-ha"))[
            "REIMAGEN_GENERATOR_TRITON_ADDRESSES"
        ].split(",")
    }
    assert addresses == {pod.name for pod in pods(stack("gpu-ha")) if "triton" in pod.name}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_commands_are_given_flags_that_they_know(overlay: str) -> None:
    knn, corpus, imports = argparse.ArgumentParser(), argparse.ArgumentParser(), argparse.ArgumentParser()
    knn.add_argument("--data")
    add_knn_flags(knn)
    add_import_command(imports.add_subparsers())
    add_corpus_flags(corpus)
    for name, parser in (("knn", knn), ("knn-merge", knn), ("corpus", corpus), ("import", imports)):
        (container,) = (pod.containers[0] for pod in pods(stack(overlay)) if pod.owner == f"Job/{name}")
        parser.parse_args([*container["command"][3:], *container["args"]] if parser is imports else container["args"])
    (saving,) = (pod.containers[0] for pod in pods(stack(overlay)) if pod.owner == "CronJob/snapshots")
    snapshots.parser().parse_args(saving["args"])
    for pod in pods(stack(overlay)):
        for container in pod.containers:
            for kind in ("livenessProbe", "readinessProbe"):
                command = container.get(kind, {}).get("exec", {}).get("command", ["python", "-m", ""])
                if command[2] == "deploy.k8s.triton_canary":
                    triton_canary.parser().parse_args(command[3:])
                elif command[2]:
                    assert command[2] == "client"
                    client_parser({}).parse_args(command[3:])


def test_what_prepares_is_asked_for_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows its flags, and says that its corpus is not there."""
    (container,) = (pod.containers[0] for pod in pods(stack("gpu")) if pod.owner == "Job/prepare")
    arguments = [word.replace("/srv/reimagen", str(tmp_path)) for word in container["args"]]
    assert train([*container["command"][3:], *arguments]) == 2
    assert f"{tmp_path}/corpus" in capsys.readouterr().err


def test_a_night_that_saved_some_is_not_tried_again() -> None:
    """One in which nothing was saved, since the service was away, is."""
    job = named(stack("gpu"), "CronJob", "snapshots")["spec"]["jobTemplate"]["spec"]
    (failed,) = (rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failed["onExitCodes"] == {"operator": "In", "values": [snapshots.SOME_NOT_SAVED]}
    assert snapshots.SOME_NOT_SAVED not in (BAD_INPUT, FULL_DISK) and job["backoffLimit"] > 0


def test_the_model_store_is_checked_before_triton_starts() -> None:
    (pod,) = (pod for pod in pods(stack(OTHERWISE)) if pod.name == "triton")
    fetch, verify = pod.spec["initContainers"]
    assert "--checksum" in fetch["command"]
    digest = environment(verify, stack(OTHERWISE))["MODELS_SHA256"]
    arguments = [word.replace("$(MODELS_SHA256)", digest) for word in verify["command"][3:]]
    assert vars(model_store.parser().parse_args(arguments))["sha256"] == digest


def test_the_overlays_take_every_component() -> None:
    """So that the rules see all of them."""
    taken: set[str] = set()
    for path in (MANIFESTS / "overlays").rglob("kustomization.yaml"):
        taken |= {each.rpartition("/")[2] for each in yaml.safe_load(path.read_text()).get("components", ())}
    there = {path.name for path in (MANIFESTS / "components").iterdir()}
    assert there - taken == {"model-store", "train-job", "autoscaling", "signed-images"} == set(OPTIONS) - taken


def test_the_readme_has_a_row_for_every_component() -> None:
    """Both ways."""
    (table,) = re.findall(r"^\| component \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    told = {
        name for names in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(.+?)`", names)
    }
    assert told == {path.name for path in (MANIFESTS / "components").iterdir()}


def _container(overlay: str, name: str) -> dict:
    return next(pod.containers[0] for pod in pods(stack(overlay)) if pod.name == name)


def test_custom_objects_are_few() -> None:
    """Each kind that Kubernetes does not bring has its schema here."""
    everything = (each for overlay in [*OVERLAYS, OTHERWISE] for each in stack(overlay))
    kinds = {each["kind"] for each in everything if "." in each["apiVersion"].split("/")[0]}
    builtin = {"Role", "RoleBinding", "NetworkPolicy", "PriorityClass"}
    assert kinds - builtin == set(CUSTOM)
    assert of_kind(stack("gpu-ha"), "LocalQueue")
