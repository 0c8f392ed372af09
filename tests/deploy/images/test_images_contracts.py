"""Dockerfiles and locks against the manifests, requirements.txt and our own imports; each rule against what it must find."""

from __future__ import annotations

import subprocess
import sysconfig
from dataclasses import replace

import pytest
import yaml

from deploy.images.building import declared_arguments
from deploy.images.catalog import BASE_IMAGES, FOLDER, IMAGES, LOCKS, ROOT, Lock, dockerfile
from deploy.images.locks import REQUIREMENTS, Pin, read_lock, read_names
from tests.deploy.images.recipes import lock_faults, providers, reachable, recipe_faults, steps
from tests.deploy.k8s.rendering import OTHERWISE, OVERLAYS, pods, stack, train_job_pods

SCRIPTS = sysconfig.get_path("scripts")
VERSIONS = read_names(REQUIREMENTS)
# What else is started in an image than what manifests say: by its entry point, by Triton, in other processes.
STARTED = {
    "retrieval": ("retrieval_svc.lexical_worker",),
    "triton": ("generator_svc.model_repository.unet.model", "generator_svc.model_repository.text_encoder.model"),
    "trainer": ("trainer.service.__main__",),
}
CLIP = ("torch", "transformers")  # of `retrieval-clip`; without it, retrieval starts no worker that imports them


def wanted() -> dict[str, tuple[set[str], set[str], set[str]]]:
    """Image -> UID:GID of the pods that run it, modules that their commands and probes start, where they mount something."""
    found: dict[str, tuple[set[str], set[str], set[str]]] = {}
    for overlay in (*OVERLAYS, OTHERWISE):
        manifests = stack(overlay)
        for pod in (*pods(manifests), *train_job_pods(manifests)):
            for container in pod.containers:
                image = container["image"].partition("reimagen/")[2].partition("@")[0].partition(":")[0]
                if not image:
                    continue
                users, modules, mounts = found.setdefault(image, (set(), set(), set()))
                context = pod.spec["securityContext"]
                users.add(f"{context['runAsUser']}:{context['runAsGroup']}")
                mounts |= {mount["mountPath"] for mount in container.get("volumeMounts", ())}
                commands = [container.get("command", [])]
                commands += [
                    probe["exec"]["command"]
                    for probe in container.values()
                    if isinstance(probe, dict) and "exec" in probe
                ]
                modules |= {words[2] for words in commands if words[:2] == ["python", "-m"]}
    return found


WANTED = wanted()


def test_dockerfiles_and_scripts_are_clean() -> None:
    for tool, pattern in (("hadolint", "*.Dockerfile"), ("shellcheck", "*.sh")):
        files = sorted(map(str, FOLDER.glob(pattern)))
        done = subprocess.run([f"{SCRIPTS}/{tool}", *files], capture_output=True, text=True)
        assert files and done.returncode == 0, done.stdout + done.stderr


def test_the_lint_finds_what_it_should() -> None:
    bad = "FROM debian\nRUN apt-get install x\n"
    done = subprocess.run([f"{SCRIPTS}/hadolint", "-"], input=bad, capture_output=True, text=True)
    assert done.returncode != 0 and "DL3006" in done.stdout


def test_every_image_of_the_manifests_has_a_dockerfile() -> None:
    for component in ("images", "images-dev"):
        document = yaml.safe_load((ROOT / "deploy/k8s/components" / component / "kustomization.yaml").read_text())
        ours = {
            line["name"].removeprefix("reimagen/")
            for line in document["images"]
            if line["name"].startswith("reimagen/")
        }
        assert {"models" if name.startswith("models") else name for name in ours} == set(IMAGES)
    assert set(WANTED) == set(IMAGES) - {"models"}, "models is a volume"


@pytest.mark.parametrize("image", IMAGES)
def test_a_dockerfile_brings_what_the_manifests_want(image: str) -> None:
    users, modules, mounts = WANTED.get(image, ({"10001:10001"}, set(), set()))
    (user,) = users
    assert recipe_faults(dockerfile(image).read_text(), user=user, modules=tuple(modules), mounts=mounts) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("@${DEBIAN_DIGEST} AS", " AS", "digest"),
        ("ARG DEBIAN_DIGEST", "ARG DEBIAN_DIGEST=sha256:00", "looked up"),
        ("FROM scratch", "FROM scratch\nRUN true", "shell"),
        ("USER 10001:10001", "USER root", "USER"),
        ('ENTRYPOINT ["python", "-m", "retrieval_svc"]', "ENTRYPOINT python -m retrieval_svc", "shell"),
        ("COPY deploy/k8s /opt/product/deploy/k8s", "", "deploy.k8s.snapshots is not copied"),
        ("COPY LICENSE", "ADD LICENSE", "ADD"),
        (
            "/opt/product /opt/product",
            "/opt/product /srv/data/product",
            "a pod mounts /srv/data over /srv/data/product",
        ),
        ('org.opencontainers.image.revision="${REVISION}"', 'org="x"', "revision"),
    ],
)
def test_a_dockerfile_that_breaks_a_promise_is_found(old: str, new: str, fault: str) -> None:
    text = dockerfile("retrieval").read_text()
    assert old in text
    users, modules, mounts = WANTED["retrieval"]
    faults = recipe_faults(text.replace(old, new), user=next(iter(users)), modules=tuple(modules), mounts=mounts)
    assert any(fault in line for line in faults), faults


def test_arguments_without_a_default_are_those_that_a_build_is_given() -> None:
    known = {base.argument for base in BASE_IMAGES} | {"DEBIAN_SNAPSHOT"}
    for image in IMAGES:
        needed = {name for name, default in declared_arguments(dockerfile(image)).items() if default is None}
        assert needed <= known, image
        froms = {step.rest.partition("@")[0] for step in steps(dockerfile(image).read_text()) if step.word == "FROM"}
        assert froms - {"scratch"} <= {base.name for base in BASE_IMAGES}, image


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_is_what_requirements_say(lock: Lock) -> None:
    assert lock_faults(read_lock(lock.path), read_names(lock.names), VERSIONS, lock.python) == []


def test_a_lock_that_is_out_of_step_is_found() -> None:
    lock = next(lock for lock in LOCKS if lock.name == "generator")
    pins, names = read_lock(lock.path), read_names(lock.names)

    def faults(changed: dict[str, Pin]) -> str:
        return " ".join(lock_faults(changed, names, VERSIONS, lock.python))

    assert "numpy is 1.0" in faults(pins | {"numpy": replace(pins["numpy"], version="1.0")})
    assert "numpy has no hash" in faults(pins | {"numpy": replace(pins["numpy"], hashes=())})
    assert "torch is 2.13.0+cu" in faults(pins | {"torch": replace(pins["torch"], version="2.13.0+cu130")})
    without = {name: pin for name, pin in pins.items() if name not in ("grpcio", "tokenizers")}
    assert "grpcio is not locked" in faults(without)
    assert "tokenizers is asked for by transformers" in faults(without)


@pytest.mark.parametrize("image", WANTED)
def test_what_an_image_starts_imports_nothing_that_is_not_locked(image: str) -> None:
    modules = {f"{name}.__main__" if "." not in name else name for name in WANTED[image][1]}
    others = reachable((*modules, *STARTED.get(image, ())))
    for lock in IMAGES[image]:
        pins = read_lock(next(known for known in LOCKS if known.name == lock).path)
        allowed = CLIP if lock == "retrieval" else ()
        missing = {
            f"{top} ({module})"
            for top, module in others.items()
            if top not in allowed and not any(name in pins for name in providers().get(top, [top]))
        }
        assert not missing, lock


def test_names_of_locks_are_of_requirements_or_asked_for_by_us() -> None:
    for lock in LOCKS:
        unknown = set(read_names(lock.names)) - set(VERSIONS)
        assert unknown <= {"urllib3"}, lock.name  # the one of the Kubernetes client, whose errors are caught
