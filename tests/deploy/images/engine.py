"""Podman with runc over a base that debootstrap makes: images are built by their own Dockerfiles, and run as pods are.

What a kubelet would do with a pod's constraints is done here: user, read-only root, no capabilities, no new privileges, the
default seccomp profile, the memory limit, and the mounts of the manifest, each a folder or a tmpfs of its size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.images.building import build_arguments, build_command
from deploy.images.catalog import DEBIAN, ROOT
from tests.deploy.k8s.rendering import Pod, environment, stack

WORK = ROOT / "build" / "images"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
MIRROR = "http://deb.debian.org"
TOOLS = ("podman", "runc", "debootstrap")
ULIMITS = ("nofile=1024:1024", "nproc=1024:1024")  # a process that may not raise its limits can still be started
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_CONFIGURATION = """
[containers]
default_ulimits = [{ulimits}]
pids_limit = 0
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""


def missing() -> str:
    """Why images cannot be built here; empty where they can."""
    absent = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")]
    if absent:
        return f"apt-get install {' '.join(absent)}"
    return "" if os.geteuid() == 0 else "debootstrap wants root"


def podman(*arguments: str, check: bool = True, timeout_s: float = 1800.0) -> subprocess.CompletedProcess[str]:
    """Run podman with a store of its own in build/images; gives what it said."""
    command, variables = ["podman", *arguments], _environment()
    # Where it runs, its monitor leaves a file for each container that was killed for its memory.
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=variables, cwd=WORK)
    assert not check or done.returncode == 0, f"{arguments}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done


def _environment() -> dict[str, str]:
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "containers.conf").write_text(_CONFIGURATION.format(ulimits=", ".join(f'"{limit}"' for limit in ULIMITS)))
    places = f'graphroot = "{WORK}/store"\nrunroot = "{WORK}/run"\n'
    (WORK / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\n{places}')
    places = {"CONTAINERS_CONF": f"{WORK}/containers.conf", "CONTAINERS_STORAGE_CONF": f"{WORK}/storage.conf"}
    return {**os.environ, **places}


def base_digest() -> str:
    """The digest of the base, which is made where it is not there: what Debian calls minbase, as its own image is."""
    name = DEBIAN.name
    if podman("image", "exists", name, check=False).returncode != 0:
        folder = WORK / "debian"
        shutil.rmtree(folder, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", "bookworm", str(folder), f"{MIRROR}/debian"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        )
        assert done.returncode == 0, done.stdout[-2000:]
        archive = WORK / "debian.tar"
        subprocess.run(["tar", "-C", str(folder), "-cf", str(archive), "."], check=True)
        podman("import", "--quiet", str(archive), name)
        archive.unlink()
        shutil.rmtree(folder)
    return podman("image", "inspect", "--format", "{{.Digest}}", name).stdout.strip()


def build(image: str, *, lock: str = "", tag: str = "dev", more: Sequence[str] = ()) -> str:
    """Build an image by its Dockerfile; gives its name. Only the addresses of archives and registries differ from a release."""
    given = build_arguments(
        image,
        {DEBIAN.argument: base_digest()},
        lock=lock,
        snapshot=".",
        revision="0" * 40,
        created="2026-11-28T00:00:00+00:00",
    )
    given |= {"DEBIAN_MIRROR": MIRROR}
    (WORK / "pip.conf").write_text("[global]\ncert = /run/authorities.crt\n")
    mounts = [f"{AUTHORITIES}:/run/authorities.crt:ro", f"{WORK}/pip.conf:/etc/pip.conf:ro"]
    if wheels := os.environ.get("REIMAGEN_WHEELS"):  # where torch's index cannot be reached: a folder with its wheel
        mounts.append(f"{wheels}:/run/wheels:ro")
        given["TORCH_INDEX"] = "/run/wheels"
    name = f"reimagen/{image}:{tag}"
    command = build_command("podman", image, name, given)
    options = ["--network=host", "--pull=never", *(f"--volume={mount}" for mount in mounts), *more]
    options += [f"--ulimit={limit}" for limit in ULIMITS]
    podman("build", *options, *command[2:])
    return name


@contextmanager
def container(
    image: str,
    pod: Pod,
    folder: Path,
    *,
    variables: Mapping[str, str | None],
    arguments: Sequence[str] | None = None,
    read_only: bool = True,
    mounts: Sequence[str] = (),
    overlay: str = "local-cpu",
) -> Iterator[str]:
    """A pod's first container, running on this machine's network under the pod's constraints; gives its id.

    Args:
        folder: gets what is mounted and may be written, `folder/MOUNT`.
        variables: other values than the manifest's; None for a variable that is left out.
        arguments: other ones than the manifest's.
        read_only: whether its root is as the manifest says, or may be written, to see what is.
    """
    told = pod.containers[0]
    command = run_flags(pod, told, folder, read_only=read_only)
    values = {**environment(told, stack(overlay)), **variables}
    command += [f"--env={name}={value}" for name, value in values.items() if value is not None]
    command += [f"--volume={mount}" for mount in mounts]
    words = [*told["command"], *(told.get("args", []) if arguments is None else arguments)]
    command += ["--entrypoint", json.dumps([words[0]]), image, *words[1:]]
    began = podman("run", "--detach", "--network=host", *command).stdout.strip()
    try:
        yield began
    finally:
        podman("rm", "--force", "--time=60", began)


def run_flags(pod: Pod, told: Mapping[str, Any], folder: Path, *, read_only: bool) -> list[str]:
    """A pod's constraints as podman says them."""
    context, inner = pod.spec["securityContext"], told["securityContext"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}, "podman's default is as containerd's"
    assert not inner["allowPrivilegeEscalation"] and inner["readOnlyRootFilesystem"]
    flags = [f"--user={context['runAsUser']}:{context['runAsGroup']}", "--security-opt=no-new-privileges"]
    flags += [f"--cap-drop={name}" for name in inner["capabilities"]["drop"]]
    flags += [f"--memory={amount(told['resources']['limits']['memory'])}", "--read-only-tmpfs=false"]
    flags.append(f"--read-only={'true' if read_only else 'false'}")
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    for mount in told.get("volumeMounts", ()):
        volume, place = volumes[mount["name"]], mount["mountPath"]
        empty = volume.get("emptyDir")
        if empty is not None and empty.get("medium") == "Memory":
            flags.append(
                f"--mount=type=tmpfs,destination={place},tmpfs-size={amount(empty.get('sizeLimit', '64Mi'))},tmpfs-mode=1777"
            )
            continue
        there = folder / place.strip("/")
        there.mkdir(parents=True, exist_ok=True)
        for path in (there, *there.rglob("*")):
            os.chown(path, context["runAsUser"], context.get("fsGroup", context["runAsGroup"]))
        flags.append(f"--volume={there}:{place}:{'ro' if mount.get('readOnly') else 'rw'}")
    return flags


def amount(text: str) -> int:
    """A quantity of Kubernetes in bytes."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text)
    assert found, text
    return int(found[1]) * _UNITS.get(found[2] or "", 1)
