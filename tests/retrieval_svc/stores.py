"""Pair stores to test with: the engine in process, and what stands for a server.

`server_local_imitation` is qdrant-client's Python imitation of a server, `server_stand_in` the same behind gRPC: they show
that we ask in the right words, not that a server answers. With QDRANT_URL set (and QDRANT_API_KEY_FILE), the same tests run
against that server; CI does not set it.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from qdrant_client import QdrantClient

from retrieval_svc.edge_shard import VectorSettings, copy_folder
from retrieval_svc.pairs import StoredPair
from retrieval_svc.qdrant_connection import QdrantSettings, connect
from retrieval_svc.vectors import EdgePairStore
from retrieval_svc.vectors_server import ServerPairStore
from tests.retrieval_svc.qdrant_stand_in import StandIn, serving

SIZE = 8
NOW = 1763848800123456789  # nanoseconds: float64 cannot tell it from its neighbours
QDRANT_URL = os.environ.get("QDRANT_URL", "")
KINDS = ("edge", "server_local_imitation", "server_stand_in", *(["server"] if QDRANT_URL else []))
SMALL = VectorSettings(exact_below_kib=1, unflushed_points=300)


def server_settings() -> QdrantSettings:
    """Of the server in QDRANT_URL, if there is one: a single copy, since it may be a single node."""
    url, key = QDRANT_URL or "http://localhost", os.environ.get("QDRANT_API_KEY_FILE", "")
    return QdrantSettings(url=url, api_key_file=Path(key) if key else None, replication_factor=1, quantization=None)


def pair(number: int, entity: str = "guide dog", **changed: object) -> StoredPair:
    """A pair with every field set."""
    given = {
        "pair_id": f"pair/{number}",
        "caption": f"{entity}, noto style",
        "entity": entity,
        "facets": {"style": ("noto", "twemoji")[number % 2]},
        "author": "Author",
        "source": ("emoji", "photos")[number % 2],
        "license": ("MIT", "CC0-1.0", "CC-BY-4.0")[number % 3],
        "safe": number % 4 == 0,
        "image_sha256": f"{number:064x}",
        "image_format": "png",
        "attributes": {"number": str(number)},
        "version": NOW + number,
    }
    return StoredPair(**(given | changed))  # type: ignore[arg-type]


def vectors(count: int, seed: int = 0) -> list[np.ndarray]:
    """float32 [SIZE] each, not normalized."""
    return list(np.random.default_rng(seed).normal(0, 3, (count, SIZE)).astype(np.float32))


def make_blank(folder: Path) -> Path:
    """An empty edge store, closed: making one takes many syncs, copying it few."""
    EdgePairStore.create(folder, embedding_size=SIZE, settings=SMALL).close()
    return folder


def copy_of(blank: Path, folder: Path) -> EdgePairStore:
    """An open copy of it."""
    copy_folder(blank, folder)
    return EdgePairStore.open(folder, settings=SMALL)


@contextmanager
def open_store(kind: str, blank: Path, folder: Path) -> Iterator[EdgePairStore | ServerPairStore]:
    """An empty store of the kind."""
    if kind == "edge":
        store = copy_of(blank, folder)
        try:
            yield store
        finally:
            store.close()
        return
    with _server_client(kind) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the imitation says that it has no indexes
        name = f"test-{uuid.uuid4()}"
        try:
            yield ServerPairStore.create(client, name, embedding_size=SIZE, settings=server_settings())
        finally:
            client.delete_collection(name)


@contextmanager
def _server_client(kind: str) -> Iterator[QdrantClient]:
    if kind == "server_local_imitation":
        with closing(QdrantClient(":memory:")) as client:
            yield client
    elif kind == "server_stand_in":
        with (
            serving(StandIn()) as url,
            closing(connect(replace(server_settings(), url=url, api_key_file=None))) as client,
        ):
            yield client
    else:
        with closing(connect(server_settings())) as client:
            yield client
