"""The service as a process: how it starts, what it refuses to start with, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.version import VERSION
from tests.retrieval_svc.serving import ROOT, TIMEOUT_S, caught_up, fill, hosted, make_pairs, spawned

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one small knowledge base."""
    folder = tmp_path_factory.mktemp("library") / "data"
    with hosted(folder) as client:
        fill(client, pairs=make_pairs(["cat"]))
        caught_up(client)
    return folder


def _run(*arguments: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retrieval_svc", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_torch_is_not_imported_to_serve() -> None:
    script = "import sys, retrieval_svc.__main__; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, timeout=60).returncode == 0


def test_it_ends_when_told_and_starts_again_on_the_same_socket(data: Path, tmp_path: Path) -> None:
    fingerprints = set()
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with spawned(data, address=f"unix:{tmp_path}/r.sock") as client:
            fingerprints.add(client.retrieve("cat").index_fingerprint)
            client.process.send_signal(number)
            started = time.monotonic()
            code = client.process.wait(TIMEOUT_S)
            assert time.monotonic() - started < 5, "a client that merely stays connected is not waited for"
            assert code == (-number if number == signal.SIGKILL else 0), client.log.read_text()
    assert len(fingerprints) == 1


def test_metrics_and_reflection(data: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with spawned(data, "--metrics-port", str(port), "--revision", "4f2a", address="127.0.0.1:0") as client:
        assert not client.address.endswith(":0")
        client.retrieve("cat", k=60)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S).read().decode()
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        stream = stub.ServerReflectionInfo(iter([ask]), timeout=TIMEOUT_S)
        names = {listed.name for listed in next(iter(stream)).list_services_response.service}
    method = 'grpc_method="reimagen.retrieval.v1.RetrievalService/Retrieve"'
    for line in (
        f"grpc_server_call_started_total{{{method}}} 1.0",
        f'grpc_server_call_duration_seconds_count{{{method},grpc_status="OK"}} 1.0',
        f'reimagen_build_info{{revision="4f2a",service="retrieval",version="{VERSION}"}} 1.0',
        'reimagen_retrieval_requests_total{leg="bm25",outcome="shortfall"} 1.0',
        'reimagen_retrieval_duration_seconds_count{leg="bm25",outcome="ok"} 1.0',
        "reimagen_retrieval_results_count 1.0",
        'reimagen_retrieval_index_documents{index="small"} 2.0',
        'reimagen_retrieval_index_generation_timestamp_seconds{index="small"} 1.',
    ):
        assert line in page, page
    assert {"reimagen.retrieval.v1.RetrievalService", "reimagen.retrieval.v1.KnowledgeBaseService"} <= names


def test_it_ends_with_the_process_that_started_it(data: Path, tmp_path: Path) -> None:
    """A parent that is killed takes the service along."""
    parent = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'retrieval_svc', 'serve', *sys.argv[1:], '--parent-pid', str(os.getpid())]\n"
        "print(subprocess.Popen(command).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    flags = ["--data", str(data), "--address", f"unix:{tmp_path}/r.sock"]
    with subprocess.Popen(
        [sys.executable, "-c", parent, *flags], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = Path(f"/proc/{int(process.stdout.readline())}/stat")
        assert process.stdout.readline().startswith("ready ")
        process.kill()
    _until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        ([], {}, "--data: missing; give it, or set REIMAGEN_RETRIEVAL_DATA"),
        ([], {"REIMAGEN_RETRIEVAL_DATE": "x"}, "REIMAGEN_RETRIEVAL_DATE: no such setting"),
        (["--data", "/proc/nowhere"], {}, "/proc/nowhere"),
        (["--data", "DATA", "--address", "unix:/nowhere/r.sock"], {}, "folder of 'unix:/nowhere/r.sock'"),
        (["--data", "DATA", "--parent-pid", "1"], {}, "--parent-pid: 1 did not start this process"),
        (["--data", "DATA", "--search-threads", "0"], {}, "--search-threads: 0 is not positive"),
        (["--data", "DATA", "--read-keys-file", "/nowhere"], {}, "--read-keys-file: /nowhere: No such file"),
        (["--data", "DATA", "--tls-key-file", "/nowhere"], {}, "--tls-certificate-file: missing"),
        (["--data", "DATA", "--image-prefixes", "http://x/"], {}, "--image-prefixes: 'http://x/' is neither"),
    ],
)
def test_bad_settings_end_it_with_one_line(
    tmp_path: Path, flags: list[str], environment: Mapping[str, str], named: str
) -> None:
    given = [str(tmp_path / "data") if flag == "DATA" else flag for flag in flags]
    done = _run("serve", "--address", f"unix:{tmp_path}/r.sock", *given, environment=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert done.stdout == ""


def test_a_taken_port_or_library_is_told(data: Path, tmp_path: Path) -> None:
    with spawned(data, address="127.0.0.1:0") as client:
        port = _run("serve", "--data", tmp_path / "other", "--address", client.address)
        library = _run("serve", "--data", data, "--address", f"unix:{tmp_path}/r.sock")
    assert (port.returncode, library.returncode) == (2, 2)
    assert f"cannot listen on '{client.address}'" in port.stderr
    assert str(data) in library.stderr and "in use" in library.stderr
