"""KNN-ImageText: each pair's nearest *other* pairs, asked of the retrieval service (Re-Imagen, section 4.1)."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
from reimagen.retrieval.v1 import retrieval_pb2, retrieval_pb2_grpc

from common.corpus import iter_pairs, read_manifest
from common.files import replacing_folder
from trainer.dataset import Progress

CANDIDATES = 12
ASKED = 24  # more than kept: held-out pairs among them are dropped
DEADLINE_S = 30.0


def write_neighbors(corpus: Path, folder: Path, address: str, progress: Progress) -> Path:
    """Ask for the neighbors of every pair's caption, the pair itself excluded, and write them as `<folder>/knn`.

    A training pair never gets a held-out neighbor, so that no held-out picture is seen in training. What is there for
    this corpus is kept.

    Args:
        corpus: the folder whose pairs the knowledge base behind `address` holds.
        folder: where `knn/neighbors.npy` (int32 [N, CANDIDATES], -1 where there are fewer) goes.
        address: of the retrieval service, `unix:/path` or `host:port`.
        progress: told of each pair.

    Raises:
        grpc.RpcError: the service failed or did not answer within the deadline.
    """
    written = folder / "knn" / f"{read_manifest(corpus).fingerprint}.npy"
    if written.is_file():
        return written
    pairs = list(iter_pairs(corpus))
    index = {pair.key: i for i, pair in enumerate(pairs)}
    nearest = np.full((len(pairs), CANDIDATES), -1, np.int32)
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)
        for i, pair in enumerate(pairs):
            request = retrieval_pb2.RetrieveRequest(
                prompt=pair.caption, k=ASKED, method=retrieval_pb2.METHOD_BM25, excluded_pair_ids=[pair.key]
            )
            found = stub.Retrieve(request, timeout=DEADLINE_S, wait_for_ready=True).neighbors
            rows = [index[n.pair_id] for n in found]
            allowed = [row for row in rows if pair.held_out or not pairs[row].held_out][:CANDIDATES]
            nearest[i, : len(allowed)] = allowed
            progress("neighbors", i + 1, len(pairs))
    with replacing_folder(folder / "knn") as temporary:
        np.save(temporary / written.name, nearest)
    return written
