"""The pairs of a knowledge base on a Qdrant server or cluster, over gRPC. One collection is one knowledge base.

Several replicas write to one collection: versions come from their clocks, so that a reader of `changes` goes back a little
(see `replica.py`). The layout is that of `vectors.py`; a snapshot is written as such a store.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from qdrant_client import QdrantClient, models

from common.service.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, NotFound
from retrieval_svc.payload import (
    BM25_VECTOR,
    BOOL_FIELDS,
    CLIP_VECTOR,
    INTEGER_FIELDS,
    KEYWORD_FIELDS,
    VERSION_SLACK,
    Conditions,
)
from retrieval_svc.point_store import BATCH, Found, PointStore, Row, copied
from retrieval_svc.qdrant_connection import QdrantSettings, asking, code_of_call
from retrieval_svc.sparse import SparseVector
from retrieval_svc.vectors import EdgePairStore

_POLL_S = 1.0
_MANIFEST = "reimagen"  # of the collection's metadata: what the knowledge base is, as JSON
_MAX_FACET_TERMS = 100_000
_EXISTS = (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.INVALID_ARGUMENT)
_INDEXES = {
    **dict.fromkeys(KEYWORD_FIELDS, models.PayloadSchemaType.KEYWORD),
    **dict.fromkeys(BOOL_FIELDS, models.PayloadSchemaType.BOOL),
    **dict.fromkeys(INTEGER_FIELDS, models.PayloadSchemaType.INTEGER),
}


class ServerPairStore(PointStore):
    """A `PairStore` (and `SparseStore`) in a collection. `client` may be shared by several."""

    def __init__(self, client: QdrantClient, collection: str, embedding_size: int, settings: QdrantSettings) -> None:
        """See `open` and `create`."""
        super().__init__()
        self._client = client
        self._collection = _Collection(client, collection, settings)
        self._name = collection
        self._settings = settings
        self._embedding_size = embedding_size
        self._is_stopped = threading.Event()

    @classmethod
    def create(
        cls,
        client: QdrantClient,
        collection: str,
        *,
        embedding_size: int,
        settings: QdrantSettings,
        manifest: Mapping[str, Any] | None = None,
    ) -> ServerPairStore:
        """Make the collection with all its indexes, or what is missing of it; then open it.

        Args:
            manifest: what is to be said of the collection; see `manifest`.

        Raises:
            FailedPrecondition: there is one that holds embeddings of another size.
            AlreadyExists: there is one that bears another manifest.
        """
        with asking(settings, f"creating collection {collection!r}"):
            if not client.collection_exists(collection):
                _create(client, collection, embedding_size, settings, manifest)
        made = cls.open(client, collection, settings=settings, embedding_size=embedding_size)
        if manifest is not None and made.manifest() != dict(manifest):
            raise AlreadyExists(f"the Qdrant server has a collection {collection!r}")
        return made

    @classmethod
    def open(
        cls, client: QdrantClient, collection: str, *, settings: QdrantSettings, embedding_size: int | None = None
    ) -> ServerPairStore:
        """Use a collection that is there, and make the indexes that it lacks; `embedding_size` is what it must have, if given.

        Raises:
            NotFound: there is none. FailedPrecondition: it is none of ours, or has another embedding size.
        """
        with asking(settings, f"opening collection {collection!r}"):
            if not client.collection_exists(collection):
                raise NotFound(f"the Qdrant server has no collection {collection!r}")
            size = _check(client, collection, embedding_size)
            there = client.get_collection(collection).payload_schema or {}
            for field, kind in _INDEXES.items():
                if field not in there:
                    client.create_payload_index(collection, field, kind, wait=True)
        return cls(client, collection, size, settings)

    @property
    def embedding_size(self) -> int:
        """Size of the embeddings; 0: it holds none."""
        return self._embedding_size

    def manifest(self) -> dict[str, Any] | None:
        """What was said of the collection when it was made; None: nothing, or nothing that can be read."""
        with asking(self._settings, f"reading what collection {self._name!r} is"):
            metadata = self._client.get_collection(self._name).config.metadata or {}
        try:
            said = json.loads(metadata[_MANIFEST])
        except (KeyError, TypeError, ValueError):
            return None
        return said if isinstance(said, dict) else None

    def facet_terms(self) -> set[str]:
        """Facets of all pairs, each as `facet_term` writes it; some that no pair has any more may be among them."""
        with asking(self._settings, f"reading the facets of collection {self._name!r}"):
            found = self._client.facet(self._name, "facet", limit=_MAX_FACET_TERMS, exact=False)
        return {str(hit.value) for hit in found.hits}

    def optimize(self) -> None:
        """Wait until the server has built its graphs, which it does by itself.

        Raises:
            DeadlineExceeded: `build_timeout_s` has passed.
        """
        until = time.monotonic() + self._settings.build_timeout_s
        while True:
            with asking(self._settings, f"asking for the state of collection {self._name!r}"):
                status = self._client.get_collection(self._name).status
            if status == models.CollectionStatus.GREEN:
                return
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"collection {self._name!r} is {status.value} after {self._settings.build_timeout_s} s"
                )
            if self._is_stopped.wait(_POLL_S):
                raise RuntimeError(f"waiting for the graphs of collection {self._name!r} was stopped")

    def stop_building(self) -> None:
        """`optimize` gives up, now and later; the server goes on."""
        self._is_stopped.set()

    def snapshot(self, folder: Path) -> None:
        """Copy all pairs into an `EdgePairStore` in the empty `folder`, up to the changes made meanwhile.

        For what fits on one disk; a larger cluster is saved with Qdrant's own snapshots, shard by shard.
        """
        begun = self.latest_version()
        copy = EdgePairStore.create(folder, embedding_size=self.embedding_size)
        try:
            after, is_last = "", False
            while not is_last:
                found, after = self._collection.scroll(Conditions(), limit=BATCH, after=after, with_embeddings=True)
                copy.write_rows([copied(point) for point in found])
                is_last = not after
            since = max(begun - VERSION_SLACK, 0)
            while changed := self.changes(since, BATCH):
                found = self._collection.retrieve([change.point for change in changed], with_embeddings=True)
                copy.write_rows([copied(point) for point in found])
                since = changed[-1].version
        finally:
            copy.close()

    def close(self) -> None:
        """Nothing: the client belongs to who connected it."""

    def _points(self) -> nullcontext[_Collection]:
        return nullcontext(self._collection)

    def _touch(self, points: Iterator[str]) -> None:
        pass


class _Collection:
    """`Points` on the server."""

    def __init__(self, client: QdrantClient, name: str, settings: QdrantSettings) -> None:
        self._client = client
        self._name = name
        self._settings = settings

    def write(self, rows: Sequence[Row]) -> None:
        points = [models.PointStruct(id=r.point, vector=_vectors(r), payload=dict(r.payload)) for r in rows]
        with self._asking("writing to"):
            self._client.upsert(self._name, points, wait=True)

    def forget(self, points: Sequence[str]) -> None:
        with self._asking("deleting from"):
            self._client.delete(self._name, models.PointIdsList(points=list(points)), wait=True)

    def retrieve(self, points: Sequence[str], *, with_embeddings: bool) -> list[Found]:
        with self._asking("reading"):
            wanted = [CLIP_VECTOR] if with_embeddings else False
            return [
                _found(r)
                for r in self._client.retrieve(self._name, list(points), with_payload=True, with_vectors=wanted)
            ]

    def scroll(
        self, wanted: Conditions, *, limit: int, after: str, with_embeddings: bool = False
    ) -> tuple[list[Found], str]:
        with self._asking("paging through"):
            records, following = self._client.scroll(
                self._name,
                scroll_filter=_filter(wanted),
                limit=limit,
                offset=after or None,
                with_payload=True,
                with_vectors=[CLIP_VECTOR] if with_embeddings else False,
            )
        return [_found(record) for record in records], "" if following is None else str(following)

    def by_version(self, *, limit: int, at_least: float = 0.0, newest_first: bool = False) -> list[Found]:
        direction = models.Direction.DESC if newest_first else models.Direction.ASC
        above = models.Filter(must=[models.FieldCondition(key="version", range=models.Range(gte=at_least))])
        with self._asking("reading the changes of"):
            records, _ = self._client.scroll(
                self._name,
                scroll_filter=above if at_least else None,
                limit=limit,
                order_by=models.OrderBy(key="version", direction=direction),
                with_payload=True,
            )
        return [_found(record) for record in records]

    def count(self, wanted: Conditions) -> int:
        with self._asking("counting"):
            return self._client.count(self._name, count_filter=_filter(wanted), exact=True).count

    def values(self, field: str, wanted: Conditions, limit: int) -> set[str]:
        with self._asking("counting"):
            found = self._client.facet(self._name, field, facet_filter=_filter(wanted), limit=limit, exact=True)
        return {str(hit.value) for hit in found.hits}

    def nearest(
        self,
        query: np.ndarray | SparseVector,
        wanted: Conditions,
        *,
        limit: int,
        exact: bool,
        with_embeddings: bool,
        fields: Sequence[str] = (),
    ) -> list[Found]:
        if isinstance(query, SparseVector):
            asked, using = models.SparseVector(indices=list(query.indices), values=list(query.values)), BM25_VECTOR
        else:
            asked, using = query.tolist(), CLIP_VECTOR
        oversampling = None if exact else self._settings.oversampling
        quantized = models.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=oversampling)
        with self._asking("searching"):
            found = self._client.query_points(
                self._name,
                query=asked,
                using=using,
                query_filter=_filter(wanted),
                search_params=models.SearchParams(hnsw_ef=self._settings.hnsw_ef, exact=exact, quantization=quantized),
                limit=limit,
                with_payload=list(fields) or True,
                with_vectors=[CLIP_VECTOR] if with_embeddings else False,
            )
        return [_found(point, point.score) for point in found.points]

    def _asking(self, attempt: str) -> Any:
        return asking(self._settings, f"{attempt} collection {self._name!r}")


def _create(
    client: QdrantClient,
    collection: str,
    embedding_size: int,
    settings: QdrantSettings,
    manifest: Mapping[str, Any] | None,
) -> None:
    pinned, cold, cached = models.Memory.PINNED, models.Memory.COLD, models.Memory.CACHED
    quantization: Any = None
    if settings.quantization == "int8":
        int8 = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, quantile=0.99, memory=pinned)
        quantization = models.ScalarQuantization(scalar=int8)
    elif settings.quantization == "turbo4":
        turbo = models.TurboQuantQuantizationConfig(bits=models.TurboQuantBitSize.BITS4, memory=pinned)
        quantization = models.TurboQuantization(turbo=turbo)
    clip = models.VectorParams(
        size=max(embedding_size, 1),
        distance=models.Distance.COSINE,
        memory=cold if settings.on_disk_originals else cached,
        datatype=models.Datatype.FLOAT16 if settings.on_disk_originals else models.Datatype.FLOAT32,
    )
    try:
        client.create_collection(
            collection,
            vectors_config={CLIP_VECTOR: clip} if embedding_size else {},
            sparse_vectors_config={BM25_VECTOR: models.SparseVectorParams(modifier=models.Modifier.IDF)},
            shard_number=settings.shard_number,
            replication_factor=settings.replication_factor,
            write_consistency_factor=settings.write_consistency_factor,
            on_disk_payload=True,
            hnsw_config=models.HnswConfigDiff(m=settings.m, ef_construct=settings.ef_construct),
            quantization_config=quantization,
            metadata={_MANIFEST: json.dumps(manifest)} if manifest is not None else None,
        )
    except grpc.RpcError as error:  # another replica was faster?
        if code_of_call(error) not in _EXISTS or not client.collection_exists(collection):
            raise


def _check(client: QdrantClient, collection: str, embedding_size: int | None) -> int:
    """The collection's embedding size, after seeing that it is one of ours and of the size that is asked for."""
    parameters = client.get_collection(collection).config.params
    vectors = parameters.vectors if isinstance(parameters.vectors, dict) else None
    if vectors is None or set(vectors) - {CLIP_VECTOR} or BM25_VECTOR not in (parameters.sparse_vectors or {}):
        raise FailedPrecondition(f"collection {collection!r} holds something else than pairs")
    size = vectors[CLIP_VECTOR].size if CLIP_VECTOR in vectors else 0
    if embedding_size is not None and size != embedding_size:
        raise FailedPrecondition(
            f"collection {collection!r} holds embeddings of size {size}, not {embedding_size}: use another name"
        )
    return size


def _vectors(row: Row) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if row.embedding is not None:
        vectors[CLIP_VECTOR] = row.embedding.tolist()
    if row.sparse is not None and row.sparse.indices:
        vectors[BM25_VECTOR] = models.SparseVector(indices=list(row.sparse.indices), values=list(row.sparse.values))
    return vectors


def _filter(wanted: Conditions) -> models.Filter | None:
    must: list[Any] = [_match(field, values) for field, values in wanted.must]
    must_not: list[Any] = [_match(field, values) for field, values in wanted.must_not]
    if wanted.has_embedding:
        must.append(models.HasVectorCondition(has_vector=CLIP_VECTOR))
    if wanted.not_points:
        must_not.append(models.HasIdCondition(has_id=list(wanted.not_points)))
    if wanted.is_deleted is not None:
        empty = models.IsEmptyCondition(is_empty=models.PayloadField(key="deleted"))
        (must_not if wanted.is_deleted else must).append(empty)
    return models.Filter(must=must, must_not=must_not) if must or must_not else None


def _match(field: str, values: Sequence[str]) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))


def _found(record: Any, score: float = 0.0) -> Found:
    vector = record.vector.get(CLIP_VECTOR) if isinstance(record.vector, dict) else None
    embedding = None if vector is None else np.asarray(vector, dtype=np.float32)
    return Found(point=str(record.id), payload=record.payload or {}, embedding=embedding, score=score)
