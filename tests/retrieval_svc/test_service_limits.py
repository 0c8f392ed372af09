"""What the service takes and what it refuses: overload, cancellation, deadlines, a model that loads, an orderly end."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from client.errors import reason, retry_after_s
from retrieval_svc import bm25, knowledge_base, serve_command
from retrieval_svc.worker_embedder import WorkerEmbedder
from tests.retrieval_svc.serving import (
    TIMEOUT_S,
    Client,
    caught_up,
    fill,
    hosted,
    make_pairs,
    refusal,
    spawned,
    vector,
)

CAT = pb.RetrieveRequest(prompt="cat", omit_images=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one small knowledge base."""
    folder = tmp_path_factory.mktemp("library") / "data"
    with hosted(folder) as client:
        fill(client, pairs=make_pairs(["cat", "guide dog"]))
        caught_up(client)
    return folder


class Gate:
    """Holds every search until it is opened, and knows how many are held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_held = 0
        self._open = threading.Event()
        search = knowledge_base.KnowledgeBase.retrieve

        def held(*arguments: Any) -> Any:
            self.num_held += 1
            assert self._open.wait(TIMEOUT_S)
            return search(*arguments)

        monkeypatch.setattr(knowledge_base.KnowledgeBase, "retrieve", held)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Open again afterwards, whatever happens."""
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        """Let all searches go on."""
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A gate before every search."""
    return Gate(monkeypatch)


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)


def _ended(calls: list[Any]) -> list[Any]:
    return [call for call in calls if call.done()]


def test_ten_times_too_many_are_refused_fast(data: Path, gate: Gate) -> None:
    with hosted(data, search_threads=1, search_queue=2) as client, gate.closed():
        calls = [client.retrieval.Retrieve.future(CAT, timeout=TIMEOUT_S) for _ in range(30)]
        _until(lambda: len(_ended(calls)) == 27)
        assert gate.num_held == 1, "all this while one search was at work"
        for call in _ended(calls):
            assert (call.code(), reason(call)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS")
            assert 0.05 <= (retry_after_s(call) or 0) <= 5
        started = time.monotonic()
        refusal(client.retrieval.Retrieve, CAT)
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == 1
        assert time.monotonic() - started < 1.0
        gate.open()
        assert all(call.result().neighbors for call in calls if call.code() is grpc.StatusCode.OK)
        assert sum(call.code() is grpc.StatusCode.OK for call in calls) == 3
        labels = {"leg": "bm25", "outcome": "resource_exhausted"}
        assert client.figure("reimagen_retrieval_requests_total", **labels) == 28


def test_a_batch_waits_where_single_calls_are_refused(data: Path, gate: Gate) -> None:
    with hosted(data, search_threads=1, search_queue=0) as client, gate.closed():
        stream = client.retrieval.BatchRetrieve(iter([pb.BatchRetrieveRequest(request=CAT)] * 40), timeout=TIMEOUT_S)
        _until(lambda: gate.num_held == 1)
        gate.open()
        assert [answer.response.neighbors[0].entity for answer in stream] == ["cat"] * 40


def test_cancelled_calls_make_room(data: Path, gate: Gate) -> None:
    with hosted(data, search_threads=1, search_queue=1) as client, gate.closed():
        ask = partial(client.retrieval.Retrieve.future, CAT, timeout=TIMEOUT_S)
        at_work = ask()
        _until(lambda: gate.num_held == 1)
        waiting = ask()
        rpc = {"grpc_method": "reimagen.retrieval.v1.RetrievalService/Retrieve"}
        _until(lambda: client.figure("reimagen_server_calls_in_flight", **rpc) == 2)
        assert refusal(client.retrieval.Retrieve, CAT).code() is FULL
        waiting.cancel()
        _until(lambda: refusal(client.retrieval.Retrieve, CAT, timeout=0.2).code() is LATE)  # it waits: there is room
        at_work.cancel()
        _until(lambda: client.figure("grpc_server_call_duration_seconds_count", **rpc, grpc_status="CANCELLED") >= 2)
        gate.open()
        _until(lambda: _is_answered(client))
        _until(lambda: client.figure("reimagen_server_calls_in_flight", **rpc) == 0)


def _is_answered(client: Client) -> bool:
    with suppress(grpc.RpcError):
        return bool(client.retrieval.Retrieve(CAT, timeout=TIMEOUT_S).neighbors)
    return False


FULL, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


def test_deadlines(data: Path, gate: Gate) -> None:
    with hosted(data, default_deadline_s=0.1, max_deadline_s=0.2) as client, gate.closed():
        for timeout_s in (None, TIMEOUT_S):
            late = refusal(client.retrieval.Retrieve, CAT, timeout=timeout_s)
            assert (late.code(), reason(late)) == (LATE, "DEADLINE_EXCEEDED")


def test_bm25_answers_while_the_model_loads(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = (sys.executable, "-m", "tests.retrieval_svc.fake_clip_worker")
    monkeypatch.setattr(serve_command, "WorkerEmbedder", partial(WorkerEmbedder, command=fake))
    with hosted(tmp_path / "data", clip=f"when:{tmp_path}/go") as client:
        create = kb_pb.CreateKnowledgeBaseRequest(name="early")
        early = refusal(client.bases.CreateKnowledgeBase, create)
        assert (early.code(), reason(early)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
    shutil.copytree(data, tmp_path / "data", dirs_exist_ok=True)
    with hosted(tmp_path / "data", clip=f"when:{tmp_path}/go") as client:
        assert client.retrieve("cat").neighbors
        own = {"query_embedding": vector(0), "query_weights": pb.QueryWeights(embedding=1)}
        assert client.retrieve("cat", method=pb.METHOD_HYBRID, **own).neighbors, "needs no model"
        for method in (pb.METHOD_CLIP, pb.METHOD_HYBRID):
            loading = refusal(client.retrieval.Retrieve, pb.RetrieveRequest(prompt="cat", method=method))
            assert (loading.code(), reason(loading)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
            assert retry_after_s(loading) == 2.0
        (tmp_path / "go").touch()
        _until(lambda: _created(client, "made"))
        pair = kb_pb.NewPair(pair_id="p", caption="a cat", image=make_pairs()[0].image)
        client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base="made", pairs=[pair]), timeout=TIMEOUT_S)
        found = client.retrieve("cat", knowledge_base="made", method=pb.METHOD_CLIP, k=1)
        assert [n.pair_id for n in found.neighbors] == ["p"]


def _created(client: Client, name: str) -> bool:
    try:
        made = client.bases.CreateKnowledgeBase(kb_pb.CreateKnowledgeBaseRequest(name=name), timeout=TIMEOUT_S)
    except grpc.RpcError:
        return False
    return (made.knowledge_base.embedding_model, made.knowledge_base.embedding_size) == ("fake", 16)


def test_logs_hold_no_prompt(data: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "xylocopa"
    prompts = (f"a {secret} bee", f"{secret} dog, {secret} style", f"{secret}, on a {secret} background")

    def broken(index: Any, lookup: Any) -> None:
        raise ValueError(f"no words in {lookup.entity!r}")

    with caplog.at_level(logging.DEBUG), hosted(data) as client:
        for prompt in prompts:
            _ask(client, prompt=prompt)
        monkeypatch.setattr(bm25.TantivyIndex, "search", broken)
        for prompt in prompts:
            _ask(client, prompt=prompt)
            own = {"query_embedding": vector(0), "query_weights": pb.QueryWeights(embedding=1)}
            _ask(client, prompt=prompt, method=pb.METHOD_HYBRID, **own)
            batch = [pb.BatchRetrieveRequest(request_id=secret, request=pb.RetrieveRequest(prompt=prompt))]
            list(client.retrieval.BatchRetrieve(iter(batch), timeout=TIMEOUT_S))
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "ValueError" in logged and "no words in" in logged and "leg_failed" in logged
    assert secret not in logged.lower()


def _ask(client: Client, **fields: Any) -> None:
    with suppress(grpc.RpcError):
        client.retrieval.Retrieve(pb.RetrieveRequest(**fields), timeout=TIMEOUT_S)


def test_sigterm_under_load_loses_no_call(data: Path, tmp_path: Path) -> None:
    """Two replicas behind a balancing client that watches their health; one is told to end. Nothing is retried."""
    shutil.copytree(data, tmp_path / "data")
    flags = ("--drain-delay-s", "0.5", "--log-level", "warning")
    with (
        spawned(data, *flags, address="127.0.0.1:0") as first,
        spawned(tmp_path / "data", *flags, address="127.0.0.1:0") as second,
    ):
        config = {
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": "reimagen.retrieval.v1.RetrievalService"},
        }
        options = (("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", 0))
        with grpc.insecure_channel(f"ipv4:{first.address},{second.address}", options=options) as channel:
            stub = pb_grpc.RetrievalServiceStub(channel)
            ended, failures, answered = threading.Event(), list[grpc.RpcError](), [0]

            def load() -> None:
                while not ended.is_set():
                    try:
                        stub.Retrieve(CAT, timeout=TIMEOUT_S)
                        answered[0] += 1
                    except grpc.RpcError as error:
                        failures.append(error)

            threads = [threading.Thread(target=load) for _ in range(4)]
            for thread in threads:
                thread.start()
            _until(lambda: answered[0] > 50)
            first.process.send_signal(signal.SIGTERM)
            assert first.process.wait(TIMEOUT_S) == 0
            at_its_end = answered[0]
            _until(lambda: answered[0] > at_its_end + 50)
            ended.set()
            for thread in threads:
                thread.join()
    assert not failures, failures[:1]
