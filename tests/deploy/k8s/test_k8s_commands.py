"""The commands of the manifests, run here as the manifests say: over real sockets, with the real Triton."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.channel import Tls
from client.knowledge_base import KnowledgeBases
from deploy.k8s import model_store, snapshots, triton_canary
from deploy.local.children import ROOT, START_TIMEOUT_S
from deploy.local.knowledge_base import LIBRARY, NAME
from deploy.local.tritonserver import TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from tests.deploy.k8s.rendering import environment, pods, stack

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="session")
def repository(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the tiny weights."""
    folder = tmp_path_factory.mktemp("models")
    export(ExportSettings(weights=weights, repository=folder, threads=1, batches="1"))
    return folder


def test_the_canary_finds_a_dead_model_that_triton_does_not(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The liveness of a Triton, once with all models, once after one's process was killed."""
    with running_triton(TritonSettings(repository=repository, log=tmp_path / "log")) as server:
        asked = [f"--address={server.address}", f"--models={repository}", "--timeout-s=20"]
        assert triton_canary.main(asked) == 0
        (victim,) = (p for p in server.stubs() if b"/unet_256/" in Path(f"/proc/{p}/cmdline").read_bytes())
        os.kill(victim, signal.SIGKILL)
        assert triton_canary.main(asked) == 2
        assert "unet_256" in capfd.readouterr().err
        with grpc.insecure_channel(server.address) as channel:
            said = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert said.status == SERVING, "this is why there is a canary"
        os.kill(server.pid, signal.SIGKILL)  # asked to end, it would wait for the model


def test_the_canary_asks_somebody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert triton_canary.main(["--address=127.0.0.1:1", f"--models={tmp_path}"]) == 2
    assert "holds no model" in capfd.readouterr().err


def test_a_model_store_is_what_was_released(
    repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy is; one with another byte in its weights, its code or its configuration, or without a file, is not."""
    assert model_store.main([str(repository)]) == 0
    digest = capfd.readouterr().out.strip()
    for i, (victim, change) in enumerate(
        (
            ("", b""),
            ("unet_64/1/unet_64.safetensors", b"\0"),
            ("unet_64/1/model.py", b"\n"),
            ("unet_1024/config.pbtxt", b"\n"),
            ("text_encoder/1/manifest.json", b"\n"),
        )
    ):
        copy = tmp_path / str(i)
        shutil.copytree(repository, copy)
        if victim:
            (copy / victim).write_bytes((copy / victim).read_bytes() + change)
        assert model_store.main([str(copy), f"--sha256={digest}"]) == (2 if victim else 0), victim
    (copy / "unet_256/1/unet_256.safetensors").unlink()
    assert model_store.main([str(copy)]) == 2
    assert model_store.main([str(tmp_path / "nothing")]) == 2


@contextmanager
def started(name: str, overlay: str, folder: Path, **others: object) -> Iterator[tuple[str, int, list[str]]]:
    """A service with the command and the variables of its container; its folders and ports are of this test.

    Gives its address, the port of its metrics, and the command of its readiness probe.
    """
    manifests = stack(overlay)
    (container,) = (pod.containers[0] for pod in pods(manifests) if pod.owner == f"Deployment/{name}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        metrics_port = listener.getsockname()[1]
    variables = environment(container, manifests) | {f"REIMAGEN_{name.upper()}_{k}": str(v) for k, v in others.items()}
    variables |= {
        f"REIMAGEN_{name.upper()}_ADDRESS": "127.0.0.1:0",
        f"REIMAGEN_{name.upper()}_METRICS_PORT": str(metrics_port),
    }
    moved = {k: _moved(v, folder) for k, v in variables.items() if v != "None"}
    moved |= {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, *container["command"][1:]], cwd=ROOT, env=moved, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("ready ").strip()
        assert address, "it did not start"
        port = address.rpartition(":")[2]
        probe = container["readinessProbe"]["exec"]["command"]
        probe = [_moved(word, folder) for word in probe[1:]]
        probe = [f"--{name}=localhost:{port}" if word.startswith(f"--{name}=") else word for word in probe]
        yield address, metrics_port, [sys.executable, *probe]
    finally:
        process.terminate()
        assert process.wait(START_TIMEOUT_S) == 0, "SIGTERM ends it well"


def _moved(text: str, folder: Path) -> str:
    return text.replace("/etc/reimagen", str(folder)).replace("/srv", str(folder))


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """What the Secrets are mounted as."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    for folder in ("tls", "triton", "retrieval", "keys"):
        (tmp_path / folder).mkdir()
        authority.cert_pem.write_to_path(str(tmp_path / folder / "ca.crt"))
    for folder in ("tls", "triton"):
        certificate.private_key_pem.write_to_path(str(tmp_path / folder / "tls.key"))
        chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        (tmp_path / folder / "tls.crt").write_bytes(chain)
    for name in ("generator", "trainer", "retrieval"):
        for right in ("readers", "admins"):
            (tmp_path / "keys" / f"{name}-{right}").write_text(f"a-key-of-{name}-{right}\n")
    (tmp_path / "keys" / "retrieval").write_text("a-key-of-retrieval-readers\n")
    (tmp_path / "keys" / "admin").write_text("a-key-of-retrieval-admins\n")
    return tmp_path


def test_a_generator_starts_as_its_pod_does_and_is_not_ready_alone(mounted: Path) -> None:
    """With the variables of the encrypted overlay. It lives, tells its metrics, and is not ready: nothing serves stages."""
    others = {"TRITON_ADDRESSES": "127.0.0.1:1", "RETRIEVAL_ADDRESS": "127.0.0.1:1", "DRAIN_DELAY_S": 0}
    with started("generator", "gpu", mounted, **others) as (address, metrics_port, probe):
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as page:
            assert b"reimagen_build_info" in page.read(), "its liveness"
        assert health(address, mounted, "liveness") == SERVING
        assert health(address, mounted, "readiness") != SERVING
        done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "NOT_SERVING" in done.stdout, done.stdout + done.stderr


def test_a_trainer_starts_as_its_pod_does_and_is_ready(mounted: Path) -> None:
    """With the variables of the encrypted overlay, and a cluster that does not answer."""
    cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    config = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
    (mounted / "config").write_text(repr(config | {"current-context": "c"}).replace("'", '"'))
    others = {"KUBERNETES_CONFIG": mounted / "config", "DRAIN_DELAY_S": 0}
    with started("trainer", "gpu", mounted, **others) as (_, _, probe):
        began = time.monotonic()
        done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - began < 30


def test_a_retrieval_starts_as_its_pod_does_and_is_saved_as_by_the_cron_job(
    mounted: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variables of the encrypted overlay, all but Qdrant's: there is none here. Of snapshots the newest are kept; one
    knowledge base that cannot be saved is no reason to save no other."""
    shutil.copytree(work / LIBRARY, mounted / "data")
    for lock in (mounted / "data").rglob("lock"):
        lock.unlink()
    qdrant = ("QDRANT_URL", "QDRANT_API_KEY_FILE", "QDRANT_CA_FILE", "QDRANT_REPLICATION_FACTOR", "SHARED_PICTURES")
    others = dict.fromkeys(qdrant) | {"DRAIN_DELAY_S": 0}
    with started("retrieval", "gpu", mounted, **others) as (address, _, probe):
        done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        (saving,) = (pod.containers[0] for pod in pods(stack("gpu")) if pod.owner == "CronJob/snapshots")
        here = f"localhost:{address.rpartition(':')[2]}"
        arguments = [_moved(word, mounted).replace("dns:///retrieval:50051", here) for word in saving["args"]]
        authority = trustme.CA().cert_pem.bytes()
        tls = Tls(roots=(mounted / "tls" / "ca.crt").read_bytes())
        saved, generations = mounted / "snapshots" / NAME, []
        with KnowledgeBases(here, api_key="a-key-of-retrieval-admins", tls=tls) as bases:
            for _ in range(3):
                assert snapshots.main([*arguments, "--keep=2"]) == 0
                generations.append(max(int(path.name) for path in saved.iterdir()))
                (pair, *_) = bases.list_pairs(NAME)
                bases.delete_pairs(NAME, [pair.pair_id])
            assert sorted(int(path.name) for path in saved.iterdir()) == generations[1:]
            bases.create("another")
            (mounted / "snapshots" / "another").write_text("no folder")
            assert [base.name for base in bases.list()] == ["another", NAME]
            assert snapshots.main(arguments) == snapshots.SOME_NOT_SAVED
            assert capsys.readouterr().err.count("not saved: another: ") == 1
            with monkeypatch.context() as patched:
                patched.setattr(shutil, "rmtree", _refused)
                assert snapshots.main([*arguments, "--keep=1"]) == snapshots.SOME_NOT_SAVED
            assert re.search(r"not saved: another: .*not removed: .*: Read-only", capsys.readouterr().err)
            assert max(int(path.name) for path in saved.iterdir()) > generations[-1]
        assert snapshots.main([*arguments, "--keep=0"]) == 2
        (mounted / "keys" / "admin").write_text("a-key-of-retrieval-readers\n")
        assert snapshots.main(arguments) == 2, "a reader may not"
        (mounted / "keys" / "admin").write_text("a-key-of-retrieval-admins\n")
        (mounted / "retrieval" / "ca.crt").write_bytes(authority)
        assert snapshots.main(arguments) == 2, "another's certificate"


def _refused(folder: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))


def health(address: str, folder: Path, name: str) -> int:
    """What the service says of a name, over TLS."""
    trusted = grpc.ssl_channel_credentials((folder / "tls" / "ca.crt").read_bytes())
    place = f"localhost:{address.rpartition(':')[2]}"
    with grpc.secure_channel(place, trusted) as channel:
        asked = health_pb2.HealthCheckRequest(service=name)
        return health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10).status
