"""The service as a process of its own, over real sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from client.errors import violations

PROMPT = "guide dog, noto style, on a blue background"
TIMEOUT_S = 20

Start = Callable[..., AbstractContextManager[Any]]
Run = Callable[..., subprocess.CompletedProcess[str]]


def _refusal(service: Any, request: pb.RetrieveRequest) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Retrieve(request, timeout=TIMEOUT_S)
    return caught.value


def _wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_retrieve(service: Any) -> None:
    response = service.stub.Retrieve(pb.RetrieveRequest(prompt=PROMPT), timeout=TIMEOUT_S)
    first, second = response.neighbors
    assert (first.pair_id, first.rank, second.rank) == ("noto--guide-dog", 1, 2)
    assert (first.image[:4], first.image_format) == (b"\x89PNG", "png")
    assert dict(first.facets) == {"style": "noto"}
    assert (first.author, first.license) == ("author of noto", "CC-BY-4.0")
    assert second.entity == "guide dog"
    assert (response.knowledge_base, response.method, response.shortfall_reason) == (
        "small",
        pb.METHOD_BM25,
        "",
    )
    assert len(response.index_fingerprint) == 64
    assert response.query.entity == "guide dog"
    assert dict(response.query.facets) == {"style": "noto"}
    assert list(response.query.scene_phrases) == ["on a blue background"]


def test_exclusion_and_shortfall(service: Any) -> None:
    request = pb.RetrieveRequest(
        prompt="cat, noto style",
        k=10,
        knowledge_base="small",
        method=pb.METHOD_BM25,
        excluded_pair_ids=["openmoji--cat"],
        exclude_exact=True,
    )
    response = service.stub.Retrieve(request, timeout=TIMEOUT_S)
    assert {n.pair_id for n in response.neighbors} == {
        "twemoji--cat",
        "fluent-emoji-flat--cat",
        "noto--cat-face",
    }
    assert "asked for 10, found 3" in response.shortfall_reason


@pytest.mark.parametrize(
    ("request_fields", "code", "field", "named"),
    [
        ({"prompt": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt", "empty"),
        ({"prompt": "x" * 10_001}, grpc.StatusCode.INVALID_ARGUMENT, "prompt", "10001"),
        ({"prompt": "dog, vaporwave style"}, grpc.StatusCode.INVALID_ARGUMENT, "prompt", "'vaporwave'"),
        ({"prompt": "noto style"}, grpc.StatusCode.INVALID_ARGUMENT, "prompt", "no entity"),
        ({"prompt": "dog", "k": 65}, grpc.StatusCode.INVALID_ARGUMENT, "k", "65"),
        ({"prompt": "dog", "method": 17}, grpc.StatusCode.INVALID_ARGUMENT, "method", "17"),
        (
            {"prompt": "dog", "knowledge_base": "big"},
            grpc.StatusCode.NOT_FOUND,
            None,
            "'big' is not one of small",
        ),
        (
            {"prompt": "dog", "method": pb.METHOD_CLIP},
            grpc.StatusCode.FAILED_PRECONDITION,
            None,
            "no CLIP index",
        ),
        (
            {"prompt": "dog", "method": pb.METHOD_HYBRID},
            grpc.StatusCode.FAILED_PRECONDITION,
            None,
            "no CLIP index",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(
    service: Any, request_fields: Mapping[str, Any], code: grpc.StatusCode, field: str | None, named: str
) -> None:
    error: Any = _refusal(service, pb.RetrieveRequest(**request_fields))
    assert error.code() == code
    assert named in error.details()
    assert [violation.field for violation in violations(error)] == ([field] if field else [])


def test_a_burst_of_calls_is_answered_like_one(service: Any) -> None:
    prompts = [PROMPT, "cat, twemoji style", "blue heart", "1st place medal"]
    alone = {p: service.stub.Retrieve(pb.RetrieveRequest(prompt=p, k=4), timeout=TIMEOUT_S) for p in prompts}

    def ask(number: int) -> bool:
        prompt = prompts[number % len(prompts)]
        return service.stub.Retrieve(pb.RetrieveRequest(prompt=prompt, k=4), timeout=TIMEOUT_S) == alone[prompt]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(200)))


def test_health_and_reflection(service: Any) -> None:
    health: Any = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", "reimagen.retrieval.v1.RetrievalService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    stream = stub.ServerReflectionInfo(iter([ask]), timeout=TIMEOUT_S)
    names = {listed.name for listed in next(iter(stream)).list_services_response.service}
    assert "reimagen.retrieval.v1.RetrievalService" in names


def test_sigterm_ends_it_and_it_starts_again_on_the_same_socket(tmp_path: Path, start_service: Start) -> None:
    address = f"unix:{tmp_path}/retrieval.sock"
    fingerprints = set()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        with start_service(address) as running:
            fingerprints.add(running.stub.Retrieve(pb.RetrieveRequest(prompt="dog")).index_fingerprint)
            running.process.send_signal(number)
            started = time.monotonic()
            code = running.process.wait(TIMEOUT_S)
            assert time.monotonic() - started < 5, "a client that merely stays connected is not waited for"
            assert code == (-number if number == signal.SIGKILL else 0)
    assert len(fingerprints) == 1


def test_tcp_metrics_and_the_limit_of_calls(start_service: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics_port = probe.getsockname()[1]
    with start_service("127.0.0.1:0", "--metrics-port", str(metrics_port), "--max-concurrent-calls", "1") as running:
        assert not running.address.endswith(":0")
        health: Any = health_pb2_grpc.HealthStub(running.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        next(iter(watch))  # takes the only place
        refused: Any = _refusal(running, pb.RetrieveRequest(prompt=PROMPT))
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        watch.cancel()

        def is_answered() -> bool:
            try:
                return bool(running.stub.Retrieve(pb.RetrieveRequest(prompt="dog", k=60), timeout=TIMEOUT_S).neighbors)
            except grpc.RpcError:
                return False

        _wait_until(is_answered)
        page = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=TIMEOUT_S).read().decode()
    method = 'method="/reimagen.retrieval.v1.RetrievalService/Retrieve"'
    for line in (
        f'reimagen_rpc_requests_total{{code="OK",{method}}} 1.0',
        f"reimagen_rpc_in_flight{{{method}}} 0.0",
        'reimagen_retrieval_shortfalls_total{method="bm25"} 1.0',
        'reimagen_retrieval_results_count{method="bm25"} 1.0',
        'reimagen_retrieval_pairs{knowledge_base="small"} 28.0',
        "reimagen_retrieval_search_seconds_count 1.0",
    ):
        assert line in page, page


def test_it_ends_with_the_process_that_started_it(tmp_path: Path, index: Path) -> None:
    """A parent that is killed takes the service along."""
    parent = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'retrieval_svc', 'serve', *sys.argv[1:], '--parent-pid', str(os.getpid())]\n"
        "print(subprocess.Popen(command).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    flags = ["--index", str(index), "--address", f"unix:{tmp_path}/retrieval.sock"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", parent, *flags],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.stdout.readline().startswith("ready ")
        process.kill()
    _wait_until(lambda: not _is_alive(child))


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--index", "/nowhere/index"], {}, "/nowhere/index/index.json does not exist"),
        ([], {}, "--index: missing; give it, or set REIMAGEN_RETRIEVAL_INDEX"),
        ([], {"REIMAGEN_RETRIEVAL_INDEKS": "x"}, "REIMAGEN_RETRIEVAL_INDEKS: no such setting"),
        (["--index", "INDEX", "--address", "unix:/nowhere/r.sock"], {}, "folder of 'unix:/nowhere/r.sock'"),
        (
            ["--index", "INDEX", "--address", f"unix:/tmp/{'x' * 120}"],
            {},
            "longer than a Unix socket's path can be",
        ),
        (["--index", "INDEX", "--parent-pid", "1"], {}, "--parent-pid: 1 did not start this process"),
    ],
)
def test_bad_settings_end_it_with_one_line(
    index: Path, run_retrieval: Run, flags: list[str], environment: Mapping[str, str], named: str
) -> None:
    done = run_retrieval("serve", *(str(index) if f == "INDEX" else f for f in flags), environment=environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert done.stdout == ""


def test_a_taken_port_is_told(start_service: Start, index: Path, run_retrieval: Run) -> None:
    with start_service("127.0.0.1:0") as running:
        done = run_retrieval("serve", "--index", index, "--address", running.address)
    assert done.returncode == 2
    assert f"cannot listen on '{running.address}'" in done.stderr
