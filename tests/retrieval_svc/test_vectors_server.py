"""The store on a Qdrant server. What needs one is skipped unless QDRANT_URL (and QDRANT_API_KEY_FILE) is set: not in CI.

Without a server, tests named `local_imitation` run over qdrant-client's Python imitation of one, and a gRPC server of our own
stands for one that fails. What all stores do alike is in `test_point_store.py`.
"""

from __future__ import annotations

import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models

from common.service.errors import DeadlineExceeded, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from retrieval_svc.pairs import PairFilter
from retrieval_svc.qdrant_connection import QdrantSettings, connect
from retrieval_svc.vectors import EdgePairStore
from retrieval_svc.vectors_server import ServerPairStore
from tests.retrieval_svc.stores import NOW, QDRANT_URL, SIZE, pair, server_settings, vectors

SETTINGS = server_settings()
needs_server = pytest.mark.skipif(not QDRANT_URL, reason="QDRANT_URL is not set")


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = QdrantClient(":memory:")
        yield opened
        opened.close()


def test_a_collection_is_found_again_local_imitation(client: QdrantClient) -> None:
    with pytest.raises(NotFound, match="no collection 'pictures'"):
        ServerPairStore.open(client, "pictures", settings=SETTINGS)
    ServerPairStore.create(client, "pictures", embedding_size=SIZE, settings=SETTINGS).upsert([pair(0)], [None])
    again = ServerPairStore.open(client, "pictures", settings=SETTINGS)
    assert (again.embedding_size, again.count()) == (SIZE, 1)
    created_twice = ServerPairStore.create(client, "pictures", embedding_size=SIZE, settings=SETTINGS)
    assert created_twice.count() == 1
    again.close()


def test_another_embedding_size_is_refused_local_imitation(client: QdrantClient) -> None:
    ServerPairStore.create(client, "pictures", embedding_size=SIZE, settings=SETTINGS)
    for use in (ServerPairStore.create, ServerPairStore.open):
        with pytest.raises(FailedPrecondition, match=r"'pictures' holds embeddings of size 8, not 512"):
            use(client, "pictures", embedding_size=512, settings=SETTINGS)


def test_a_foreign_collection_is_refused_local_imitation(client: QdrantClient) -> None:
    client.create_collection("theirs", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT))
    with pytest.raises(FailedPrecondition, match="something else than pairs"):
        ServerPairStore.create(client, "theirs", embedding_size=4, settings=SETTINGS)


def test_a_collection_without_embeddings_local_imitation(client: QdrantClient) -> None:
    store = ServerPairStore.create(client, "texts", embedding_size=0, settings=SETTINGS)
    store.upsert([pair(0)], [None])
    assert ServerPairStore.open(client, "texts", settings=SETTINGS).embedding_size == 0
    assert store.named("guide dog", {}) == [pair(0)]


def test_a_snapshot_opens_in_process_local_imitation(client: QdrantClient, tmp_path: Path) -> None:
    store = ServerPairStore.create(client, "pictures", embedding_size=SIZE, settings=SETTINGS)
    store.upsert([pair(number) for number in range(30)], [*vectors(29), None])
    store.delete(["pair/4"], NOW + 100)
    store.snapshot(tmp_path / "copy")
    copy = EdgePairStore.open(tmp_path / "copy")
    assert copy.changes(0, 99) == store.changes(0, 99)
    query = vectors(1, seed=3)[0]
    both = [s.nearest(query, limit=5, filter=PairFilter(), exact=True) for s in (store, copy)]
    assert [hit.pair for hit in both[0]] == [hit.pair for hit in both[1]]
    assert (copy.count(), copy.count(with_embedding=True), copy.latest_version()) == (29, 28, NOW + 100)
    copy.close()


class Recorder:
    """Takes the place of a client, and keeps what a collection was to be created with."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.indexed: dict[str, Any] = {}

    def collection_exists(self, name: str) -> bool:
        return bool(self.created)

    def create_collection(self, name: str, **settings: Any) -> None:
        self.created = settings

    def create_payload_index(self, name: str, field: str, kind: Any, **_: Any) -> None:
        self.indexed[field] = kind

    def get_collection(self, name: str) -> Any:
        vectors_config, sparse = self.created["vectors_config"], self.created["sparse_vectors_config"]
        return SimpleNamespace(
            config=SimpleNamespace(params=SimpleNamespace(vectors=vectors_config, sparse_vectors=sparse)),
            payload_schema=dict(self.indexed),
        )


def created(**changed: Any) -> Recorder:
    recorder = Recorder()
    settings = replace(QdrantSettings(url="https://qdrant"), **changed)
    ServerPairStore.create(recorder, "pictures", embedding_size=512, settings=settings)  # type: ignore[arg-type]
    return recorder


def test_a_collection_is_created_as_operations_asks() -> None:
    made = created(shard_number=12, write_consistency_factor=2, m=6, ef_construct=64)
    asked = made.created
    assert (asked["shard_number"], asked["replication_factor"], asked["write_consistency_factor"]) == (12, 2, 2)
    assert (asked["hnsw_config"].m, asked["hnsw_config"].ef_construct) == (6, 64)
    clip = asked["vectors_config"]["clip"]
    assert (clip.size, clip.distance, clip.memory) == (512, models.Distance.COSINE, models.Memory.COLD)
    assert clip.datatype == models.Datatype.FLOAT16
    turbo = asked["quantization_config"].turbo
    assert (turbo.bits, turbo.memory) == (models.TurboQuantBitSize.BITS4, models.Memory.PINNED)
    assert asked["sparse_vectors_config"]["bm25"].modifier == models.Modifier.IDF
    assert set(made.indexed) == {
        "facet",
        "license",
        "source",
        "name",
        "content",
        "safety",
        "level",
        "deleted",
        "version",
    }
    assert created(quantization="int8").created["quantization_config"].scalar.memory == models.Memory.PINNED
    plain = created(quantization=None, on_disk_originals=False).created
    assert plain["quantization_config"] is None
    assert plain["vectors_config"]["clip"].datatype == models.Datatype.FLOAT32


def test_the_url_is_checked_and_a_key_is_not_sent_in_the_open(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    for url in ("qdrant:6334", "ftp://qdrant", "https://", "http://qdrant/prefix"):
        with pytest.raises(ValueError, match="is not http"):
            connect(QdrantSettings(url=url))
    with pytest.raises(ValueError, match="unencrypted"):
        connect(QdrantSettings(url="http://qdrant", api_key_file=tmp_path / "key"))
    connect(QdrantSettings(url="https://qdrant", api_key_file=tmp_path / "key")).close()


class Failing(grpc.GenericRpcHandler):
    """Answers every call with one status, after a delay."""

    def __init__(self, code: grpc.StatusCode, delay_s: float = 0.0) -> None:
        self.metadata: dict[str, str] = {}
        self._code, self._delay_s = code, delay_s

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        self.metadata = dict(details.invocation_metadata)

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            time.sleep(self._delay_s)
            context.abort(self._code, "payload of somebody")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def failing_server(handler: Failing) -> Iterator[str]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        port = server.add_insecure_port("127.0.0.1:0")
        server.add_generic_rpc_handlers((handler,))
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, FailedPrecondition),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
def test_what_fails_on_the_server_is_said_without_its_words(
    code: grpc.StatusCode, error: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("the-key\n")
    settings = replace(SETTINGS, api_key_file=tmp_path / "key")
    handler = Failing(code)
    with failing_server(handler) as url:
        client = connect(replace(settings, url=url))
        store = ServerPairStore(client, "pictures", SIZE, settings)
        with pytest.raises(error, match="collection 'pictures'") as told:
            store.upsert([pair(0)], [None])
        assert "payload of somebody" not in str(told.value)
        assert handler.metadata["api-key"] == "the-key"
        for ask in (
            lambda: store.count(),
            lambda: store.changes(0, 5),
            lambda: store.nearest(vectors(1)[0], limit=1, filter=PairFilter()),
            lambda: store.get(["a"]),
            lambda: store.page(after="", limit=1, filter=PairFilter()),
            lambda: store.contents_in_use(["a"]),
            lambda: store.delete(["a"], NOW),
            lambda: store.optimize(),
            lambda: ServerPairStore.open(client, "pictures", settings=settings),
        ):
            with pytest.raises(error, match="collection 'pictures'"):
                ask()
        client.close()


def test_every_call_has_a_deadline() -> None:
    with failing_server(Failing(grpc.StatusCode.OK, delay_s=2.0)) as url:
        client = connect(QdrantSettings(url=url, timeout_s=1))
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="in time"):
            ServerPairStore(client, "pictures", SIZE, SETTINGS).count()
        assert time.monotonic() - begun < 1.9
        client.close()


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = connect(QdrantSettings(url=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout_s=2))
        with pytest.raises((Unavailable, DeadlineExceeded)):
            ServerPairStore.open(client, "pictures", settings=SETTINGS)
        client.close()


@needs_server
def test_a_server_keeps_the_settings_of_a_collection() -> None:
    client, name = connect(SETTINGS), f"test-{uuid.uuid4()}"
    try:
        settings = replace(SETTINGS, quantization="turbo4", shard_number=2)
        store = ServerPairStore.create(client, name, embedding_size=SIZE, settings=settings)
        store.upsert([pair(number) for number in range(200)], vectors(200))
        store.optimize()
        kept = client.get_collection(name).config
        assert kept.params.shard_number == 2
        assert isinstance(kept.quantization_config, models.TurboQuantization)
        assert store.nearest(vectors(200)[3], limit=1, filter=PairFilter())[0].pair == pair(3)
    finally:
        client.delete_collection(name)
        client.close()


@needs_server
def test_a_server_with_keys_refuses_a_wrong_one(tmp_path: Path) -> None:
    if not SETTINGS.api_key_file:
        pytest.skip("QDRANT_API_KEY_FILE is not set")
    (tmp_path / "key").write_text("wrong")
    settings = replace(SETTINGS, api_key_file=tmp_path / "key")
    client = connect(settings)
    with pytest.raises(FailedPrecondition, match="refuses the API key"):
        ServerPairStore.open(client, "pictures", settings=settings)
    client.close()
