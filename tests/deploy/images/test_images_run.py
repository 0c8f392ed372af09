"""Images built by their Dockerfiles and run under the constraints of their pods: `make test-images` (REIMAGEN_IMAGES=1)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.corpus import write_corpus
from common.scenes import scene_phrases
from deploy.local.children import ROOT
from deploy.local.knowledge_base import LIBRARY
from deploy.local.tritonserver import TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from retrieval_svc.iconify import FACETS, VERSION
from tests.deploy.images.engine import build, container, missing, podman
from tests.deploy.k8s.rendering import Pod, pods, stack
from tests.generator_svc.tiny_stack import make_pairs

pytestmark = pytest.mark.skipif(not os.environ.get("REIMAGEN_IMAGES"), reason="make test-images builds and runs them")
LOCKS = {"retrieval": "", "generator": "", "trainer": "trainer-cpu"}
START_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 900.0
VOLUME = "srv/reimagen"
JOBS = (("import", 0), ("corpus", 0), ("prepare", 0), ("knn", 0), ("knn", 1), ("knn-merge", 0), ("train", 0))
ALONE = dict.fromkeys(
    (
        "REIMAGEN_RETRIEVAL_QDRANT_URL",
        "REIMAGEN_RETRIEVAL_QDRANT_REPLICATION_FACTOR",
        "REIMAGEN_RETRIEVAL_SHARED_PICTURES",
    )
)
# Points where it mounts, and files that it makes of the host's.
MADE_BY_PODMAN = tuple(
    f" /{name}"
    for name in (
        *("etc", "run", "dev", "proc", "sys", "tmp", "srv", "srv/data", "srv/snapshots", "srv/pictures"),
        *("etc/hosts", "etc/resolv.conf", "etc/hostname", "etc/mtab", "etc/passwd", "etc/group", "run/.containerenv"),
    )
)
LOOK = """
import os, stat
TOOLS = 'sh', 'bash', 'dash', 'busybox', 'apt', 'dpkg', 'perl', 'pip', 'pip3'
found = []
for top, folders, files in os.walk('/'):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ('/proc', '/sys', '/dev', '/tmp')]
    for name in files + folders:
        path = os.path.join(top, name)
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode): continue
        if os.access(path, os.W_OK): found.append('writable ' + path)
        if mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(mode): found.append('set-uid ' + path)
        if stat.S_ISREG(mode) and name in TOOLS: found.append('tool ' + path)
print('\\n'.join(found))
"""


@pytest.fixture(scope="module", params=LOCKS)
def image(request: pytest.FixtureRequest) -> str:
    """An image, built where this session has not yet built it."""
    return built(request.param)


def built(name: str, made: dict[str, str] = {}) -> str:  # noqa: B006 # of the session
    """The image's name, after one build of a session."""
    if missing():
        pytest.fail(missing())
    if name not in made:
        made[name] = build(name, lock=LOCKS[name])
    return made[name]


def pod(name: str) -> Pod:
    """Of a Deployment, as `local-cpu` has it."""
    (found,) = (p for p in pods(stack("local-cpu")) if p.owner == f"Deployment/{name}")
    return found


def test_an_image_has_no_shell_and_nothing_that_its_user_may_write(image: str) -> None:
    done = podman("run", "--rm", "--entrypoint", "python", image, "-c", LOOK)
    assert not done.stdout.strip(), done.stdout
    label = '{{index .Config.Labels "org.opencontainers.image.base.digest"}} {{.Config.User}}'
    said = podman("image", "inspect", "--format", label, image).stdout.split()
    assert said[0].startswith("sha256:") and said[1] == "10001:10001"


def test_every_library_that_an_image_loads_is_in_it(image: str) -> None:
    """The dynamic linker finds what each binary of the environment and of Debian names."""
    place = podman("image", "mount", image).stdout.strip()
    try:
        lost = unresolved(Path(place))
    finally:
        podman("image", "unmount", image)
    assert lost == []


def unresolved(root: Path) -> list[str]:
    """Binaries of a root file system that name a library which is nowhere in it."""
    there = {path.name for path in root.rglob("*.so*")}
    lost = []
    for path in root.rglob("*.so*"):
        if path.is_symlink() or not path.is_file() or path.read_bytes()[:4] != b"\x7fELF":
            continue
        said = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
        needed = [line.split("[")[1].split("]")[0] for line in said.splitlines() if "(NEEDED)" in line]
        lost += [f"{path.relative_to(root)}: {name}" for name in needed if name not in there]
    return lost


def test_an_image_is_the_same_when_it_is_built_again(tmp_path: Path) -> None:
    """Every file of retrieval's, byte for byte, from the same archive and lock; times are the engine's to set."""
    first, second = built("retrieval"), build("retrieval", tag="again", more=("--no-cache",))
    digests = []
    for name in (first, second):
        place = podman("image", "mount", name).stdout.strip()
        listed = subprocess.run(
            ["sh", "-c", "find . -type f -print0 | sort -z | xargs -0 sha256sum"],
            cwd=place,
            capture_output=True,
            text=True,
        ).stdout
        digests.append(dict(reversed(line.split("  ", 1)) for line in listed.splitlines()))
        podman("image", "unmount", name)
    differing = sorted(
        path for path in digests[0].keys() | digests[1].keys() if digests[0].get(path) != digests[1].get(path)
    )
    assert digests[0] and differing == []


@contextmanager
def stack_of_images(
    folder: Path, weights: Path, work: Path, *, read_only: bool
) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Retrieval and generator as containers, their stages in a real Triton beside them; ids and ports by name."""
    ports = dict(zip(("retrieval", "generator", "rm", "gm"), free_ports(4), strict=True))
    shutil.copytree(work / LIBRARY, folder / "retrieval/srv/data")
    for lock in (folder / "retrieval").rglob("lock"):
        lock.unlink()
    repository = folder / "models"
    export(ExportSettings(weights=weights, repository=repository, threads=1, batches="1"))
    with ExitStack() as opened:
        triton = opened.enter_context(running_triton(TritonSettings(repository=repository, log=folder / "triton.log")))
        retrieval = {
            "REIMAGEN_RETRIEVAL_ADDRESS": f"127.0.0.1:{ports['retrieval']}",
            "REIMAGEN_RETRIEVAL_METRICS_PORT": str(ports["rm"]),
            "REIMAGEN_RETRIEVAL_DRAIN_DELAY_S": "0",
        }
        generator = {
            "REIMAGEN_GENERATOR_ADDRESS": f"127.0.0.1:{ports['generator']}",
            "REIMAGEN_GENERATOR_METRICS_PORT": str(ports["gm"]),
            "REIMAGEN_GENERATOR_TRITON_ADDRESSES": triton.address,
            "REIMAGEN_GENERATOR_RETRIEVAL_ADDRESS": f"127.0.0.1:{ports['retrieval']}",
            "REIMAGEN_GENERATOR_DRAIN_DELAY_S": "0",
        }
        ids = {
            name: opened.enter_context(
                container(built(name), pod(name), folder / name, variables=variables, read_only=read_only)
            )
            for name, variables in (("retrieval", retrieval | ALONE), ("generator", generator))
        }
        for name, began in ids.items():
            until_ready(f"127.0.0.1:{ports[name]}", began)
        yield ids, ports


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody has now."""
    opened = [socket.socket() for _ in range(count)]
    for each in opened:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in opened]
    for each in opened:
        each.close()
    return ports


def until_ready(address: str, began: str) -> None:
    """Ask as the readiness probe does, until the service of a container serves."""
    end = time.monotonic() + START_TIMEOUT_S
    asked = health_pb2.HealthCheckRequest(service="readiness")
    with grpc.insecure_channel(address) as channel:
        while True:
            try:
                if health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5).status == 1:
                    return
            except grpc.RpcError:
                pass
            running = podman("inspect", "--format", "{{.State.Running}}", began).stdout.strip() == "true"
            assert running and time.monotonic() < end, podman("logs", began, check=False).stderr[-4000:]
            time.sleep(0.5)


def draw(ports: dict[str, int], out: Path) -> None:
    """One picture by the client, from the containers."""
    command = [sys.executable, "-m", "client", "generate", f"--generator=127.0.0.1:{ports['generator']}"]
    command += ["--prompt=a guide dog, noto style, on a blue background", "--seed=7", f"--out={out}", "--steps-64=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(out.rglob("*.png"))


def test_services_draw_a_picture_under_the_constraints_of_their_pods(weights: Path, work: Path, tmp_path: Path) -> None:
    """Read-only roots, no capabilities, memory limits: they are ready, they answer, and SIGTERM ends them well."""
    with stack_of_images(tmp_path, weights, work, read_only=True) as (ids, ports):
        draw(ports, tmp_path / "drawn")
        for name, began in ids.items():
            peak = Path(
                f"/proc/{podman('inspect', '--format', '{{.State.Pid}}', began).stdout.strip()}/status"
            ).read_text()
            rss = next(line for line in peak.splitlines() if line.startswith("VmHWM")).split()[1]
            assert "NoNewPrivs:\t1" in peak and "CapEff:\t0000000000000000" in peak and "Seccomp:\t2" in peak
            print(f"{name}: {int(rss) // 1024} MiB at most")
            podman("stop", "--time=60", began)
            assert podman("inspect", "--format", "{{.State.ExitCode}}", began).stdout.strip() == "0", name
        written = sorted(path.relative_to(tmp_path) for name in ids for path in (tmp_path / name / "tmp").rglob("*"))
        print("left in /tmp:", [str(path) for path in written])


def test_services_write_nothing_outside_of_their_mounts(weights: Path, work: Path, tmp_path: Path) -> None:
    """The same with roots that may be written: what changed in them is what a manifest would have to mount."""
    with stack_of_images(tmp_path, weights, work, read_only=False) as (ids, ports):
        draw(ports, tmp_path / "drawn")
        for name, began in ids.items():
            changed = [line for line in podman("diff", began).stdout.splitlines() if not line.endswith(MADE_BY_PODMAN)]
            assert changed == [], name


def test_a_trainer_answers_under_the_constraints_of_its_pod(tmp_path: Path) -> None:
    """With a cluster that does not answer, in place of the one whose token a pod would have."""
    (port, metrics) = free_ports(2)
    config = '{"clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:1"}}],"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":{}}],"current-context":"c"}'
    (tmp_path / "config").write_text(config)
    variables = {
        "REIMAGEN_TRAINER_ADDRESS": f"127.0.0.1:{port}",
        "REIMAGEN_TRAINER_METRICS_PORT": str(metrics),
        "REIMAGEN_TRAINER_DRAIN_DELAY_S": "0",
        "REIMAGEN_TRAINER_KUBERNETES_CONFIG": "/etc/cluster",
    }
    mounts = [f"{tmp_path}/config:/etc/cluster:ro"]
    with container(built("trainer"), pod("trainer"), tmp_path / "mounted", variables=variables, mounts=mounts) as began:
        until_ready(f"127.0.0.1:{port}", began)
        done = subprocess.run(
            [sys.executable, "-m", "client", "train", "list", f"--trainer=127.0.0.1:{port}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_jobs_lead_from_pictures_to_a_checkpoint_under_the_constraints_of_their_pods(tmp_path: Path) -> None:
    """As the guide has them, one after another on one volume: 48 pictures, two shards of neighbors, two steps of a run."""
    port, metrics = free_ports(2)
    variables = {
        "REIMAGEN_RETRIEVAL_ADDRESS": f"127.0.0.1:{port}",
        "REIMAGEN_RETRIEVAL_METRICS_PORT": str(metrics),
        "REIMAGEN_RETRIEVAL_DRAIN_DELAY_S": "0",
    }
    many = [
        replace(pair, key=f"{pair.key}-{n}", entity=f"{pair.entity} {n}", caption=f"{pair.caption}, {n}")
        for n in range(4)
        for pair in make_pairs()
    ]
    volume = tmp_path / "volume"
    source = volume / VOLUME / "source"
    write_corpus(source, many, name="tiny", version=VERSION, facets=FACETS, scene_phrases=scene_phrases())
    other = {"--address": f"127.0.0.1:{port}", "--retrieval": f"127.0.0.1:{port}", "--shards": "2"}
    with container(built("retrieval"), pod("retrieval"), tmp_path / "retrieval", variables=variables | ALONE) as began:
        until_ready(f"127.0.0.1:{port}", began)
        for name, index in JOBS:
            run_job(name, index, volume, other, ["--examples=32"] if name == "train" else [])
    assert list((volume / VOLUME / "corpus").glob("*.tar"))
    assert list((volume / VOLUME / "runs/first").rglob("*.safetensors"))


def run_job(name: str, index: int, volume: Path, other: dict[str, str], more: list[str]) -> None:
    """A Job's pod from beginning to end, with other values for some of its flags."""
    (pod,) = (each for each in pods(stack("local-cpu")) if each.owner == f"Job/{name}")
    words = [word.partition("=") for word in pod.containers[0]["args"]]
    arguments = [f"{flag}={other[flag]}" if flag in other else "".join((flag, *rest)) for flag, *rest in words]
    image = pod.containers[0]["image"].partition("reimagen/")[2].partition(":")[0]
    given: dict[str, str | None] = {"JOB_COMPLETION_INDEX": str(index)}
    with container(built(image), pod, volume, variables=given, arguments=[*arguments, *more]) as began:
        status = podman("wait", began, timeout_s=JOB_TIMEOUT_S).stdout.strip()
        said = podman("logs", began)
        assert status == "0", f"{name}: {status}: {said.stdout[-2000:]}{said.stderr[-4000:]}"
        print(f"{name} {index}: {said.stdout.strip()[-200:]}")


def test_commands_of_jobs_start_in_their_images() -> None:
    """What a Job's command needs at its start is there: each prints its help under the Job's constraints."""
    for job in pods(stack("local-cpu")):
        name = job.containers[0]["image"].partition("reimagen/")[2].partition(":")[0]
        if job.owner.split("/")[0] not in ("Job", "CronJob") or name not in LOCKS:
            continue
        words = [word for word in job.containers[0]["command"] if not word.startswith("-") or word == "-m"]
        done = podman(
            "run",
            "--rm",
            "--read-only",
            "--cap-drop=ALL",
            "--user=10001:10001",
            "--entrypoint",
            "python",
            built(name),
            *words[1:],
            "--help",
        )
        assert "usage" in done.stdout, job.owner


def test_a_limit_of_memory_ends_what_is_over_it() -> None:
    """The engine's limit is one: a process that takes more is killed, status 137."""
    script = "b = bytearray(256 << 20); print(len(b))"
    done = podman(
        "run",
        "--rm",
        "--memory=64m",
        "--memory-swap=64m",
        "--entrypoint",
        "python",
        built("retrieval"),
        "-c",
        script,
        check=False,
    )
    assert done.returncode == 137
