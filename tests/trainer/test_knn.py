"""KNN-ImageText: neighbors as a retrieval service says them, without the pair itself, and none held out in training."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
from reimagen.retrieval.v1 import retrieval_pb2, retrieval_pb2_grpc

from common.corpus import read_manifest
from tests.trainer.shapes import shape_pairs
from trainer.knn import CANDIDATES, write_neighbors


class Recorded(retrieval_pb2_grpc.RetrievalServiceServicer):
    """Answers with every other pair, those of the same entity first, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[retrieval_pb2.RetrieveRequest] = []

    def Retrieve(self, request: retrieval_pb2.RetrieveRequest, context: grpc.ServicerContext):
        self.asked.append(request)
        pairs = shape_pairs()
        asker = next(p for p in pairs if p.caption == request.prompt)
        ranked = sorted(pairs, key=lambda p: p.entity != asker.entity)
        kept = [p for p in ranked if p.key not in request.excluded_pair_ids][: request.k]
        found = [retrieval_pb2.Neighbor(pair_id=p.key, rank=i) for i, p in enumerate(kept)]
        return retrieval_pb2.RetrieveResponse(neighbors=found)


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recorded, str]]:
    """The service and its address."""
    address = f"unix:{tmp_path_factory.mktemp('socket')}/retrieval"
    server, recorded = grpc.server(futures.ThreadPoolExecutor(2)), Recorded()
    retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(recorded, server)
    server.add_insecure_port(address)
    server.start()
    yield recorded, address
    server.stop(0).wait()


def test_neighbors(service: tuple[Recorded, str], corpus_folder: Path, tmp_path: Path) -> None:
    recorded, address = service
    progress: list[tuple[str, int, int]] = []
    path = write_neighbors(corpus_folder, tmp_path, address, lambda *told: progress.append(told))
    assert path == tmp_path / "knn" / f"{read_manifest(corpus_folder).fingerprint}.npy"
    nearest, pairs = np.load(path), shape_pairs()
    assert nearest.shape == (24, CANDIDATES) and nearest.dtype == np.int32
    for i, pair in enumerate(pairs):
        rows = [pairs[j] for j in nearest[i] if j >= 0]
        assert len(rows) == CANDIDATES and i not in nearest[i]
        assert all(p.entity == pair.entity for p in rows[:2])
        if not pair.held_out:
            assert not any(p.held_out for p in rows), "training never sees a held-out picture"
    assert any(pairs[j].held_out for i, p in enumerate(pairs) if p.held_out for j in nearest[i])
    assert [r.prompt for r in recorded.asked] == [p.caption for p in pairs]
    assert all(list(r.excluded_pair_ids) == [p.key] for r, p in zip(recorded.asked, pairs, strict=True))
    assert {r.method for r in recorded.asked} == {retrieval_pb2.METHOD_BM25}
    assert progress[-1] == ("neighbors", 24, 24)
    again = write_neighbors(corpus_folder, tmp_path, "unix:/nowhere", lambda *told: None)
    assert again == path and len(recorded.asked) == 24, "what is there is kept"


def test_a_failing_service_leaves_nothing(corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.knn.DEADLINE_S", 0.2)
    with pytest.raises(grpc.RpcError):
        write_neighbors(corpus_folder, tmp_path, f"unix:{tmp_path}/nobody", lambda *told: None)
    assert not list(tmp_path.rglob("*"))
