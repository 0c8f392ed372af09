"""A knowledge base: gamma(p, B) of the Re-Imagen paper, the top-k pairs of B for a prompt p; changed while it answers."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.corpus import Facet
from common.images import ImageError
from common.pictures import take_in
from common.service.errors import DataLoss, DeadlineExceeded, InvalidArgument, NotFound, ServiceError, Unavailable
from retrieval_svc.bm25 import Bm25Process
from retrieval_svc.build_debt import BuildDebt
from retrieval_svc.embedding import Embedder
from retrieval_svc.in_flight import InFlight
from retrieval_svc.knowledge_base_folder import Bm25, Parts, make_folder, num_bytes, open_parts
from retrieval_svc.manifest import BM25, PAIRS, Manifest, fitting_manifest
from retrieval_svc.new_pairs import UriReader
from retrieval_svc.pair_writer import PairWriter
from retrieval_svc.pairs import Brief, Change, NewPair, PairFilter, Scored, StoredPair, Upserted
from retrieval_svc.query_vector import PictureEmbedder
from retrieval_svc.replica_feed import TOMBSTONES_KEPT_NS
from retrieval_svc.retrieval import Method, Neighbor, Query, Retrieval, Stats, WholePair
from retrieval_svc.search import Searcher, SearchResult
from retrieval_svc.snapshot import SnapshotError, SnapshotReport, write_snapshot
from retrieval_svc.vectors import VectorSettings

MAX_PAGE = 1000
MAX_BACKLOG = 100_000  # changes that the lexical index may be behind before writers wait for it
LEG_THREADS = 4

_EVERYTHING = PairFilter()
_LOG = logging.getLogger(__name__)


class KnowledgeBase:
    """One knowledge base, opened; safe to use from several threads."""

    def __init__(self, parts: Parts, *, embedder: Embedder | None, uri_reader: UriReader | None = None) -> None:
        """Put the parts together; see `open`. `close` lets go of them."""
        self.name = parts.manifest.name
        self.folder = parts.folder
        self.images = parts.images
        self.store = parts.store
        self._lexical = parts.lexical
        self._projection = parts.projection
        self._feed = parts.feed
        self._images_folder = parts.images_folder
        self._resources = parts.resources
        self._read_uri = uri_reader
        self._in_flight = InFlight(lambda: NotFound(f"knowledge_base: {parts.manifest.name!r} is closed"))
        # Pairs changed since the lexical index last took changes in, with their versions; replaced, never written to.
        self._recent: Mapping[str, int] = {}
        self._noting = threading.Lock()
        self._debt = BuildDebt(parts.folder, parts.lexical.num_pairs)
        looks = PictureEmbedder(parts.manifest, embedder)
        threads = ThreadPoolExecutor(LEG_THREADS, thread_name_prefix=f"clip-{self.name}")
        parts.resources.callback(threads.shutdown)
        self._searcher = Searcher(store=parts.store, lexical=parts.lexical, embedder=looks, executor=threads)
        self._writer = PairWriter(
            parts.folder,
            parts.manifest,
            store=parts.store,
            images=parts.images,
            embedder=looks,
            read_uri=uri_reader,
            on_written=self._written,
        )
        if parts.feed:
            parts.feed.before, parts.feed.after = self._learn, self._forget_seen
            self._writer.learn(parts.facets)

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str = "",
        facets: Sequence[Facet] = (),
        scene_phrases: Sequence[str] = (),
        embedding_size: int | None = None,
        embedder: Embedder | None = None,
        uri_reader: UriReader | None = None,
        settings: VectorSettings | None = None,
    ) -> KnowledgeBase:
        """Make an empty knowledge base, which appears by one rename, and open it.

        Args:
            name: empty: the folder's name.
            embedding_size: 0: none; None: the embedder's, if there is one.

        Raises:
            InvalidArgument: a name, facet or size cannot be.
            KnowledgeBaseError: `folder` exists.
        """
        manifest = fitting_manifest(
            name or folder.name,
            facets=facets,
            scene_phrases=scene_phrases,
            embedding_size=embedding_size,
            embedder=embedder,
        )
        make_folder(folder, manifest, settings)
        return cls.open(folder, embedder=embedder, uri_reader=uri_reader, settings=settings)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        embedder: Embedder | None = None,
        uri_reader: UriReader | None = None,
        settings: VectorSettings | None = None,
        bm25: Bm25 = "tantivy",
        bm25_process: Bm25Process = "off",
    ) -> KnowledgeBase:
        """Open a knowledge base: what a crash has left undone is done first, so that both indexes agree.

        Args:
            embedder: embeds prompts and pictures; None: there are only embeddings that are given.
            uri_reader: gives the bytes behind an `image_uri` that the operator allows, and b"" for any other; None: none
                is ever read.
            settings: of the vector index.
            bm25: what answers BM25. bm25_process: see `TantivyIndex.open`.

        Raises:
            KnowledgeBaseError: it is missing, damaged, of another format, or another process has it open.
        """
        parts = open_parts(folder, settings, bm25, bm25_process)
        return cls(parts, embedder=embedder, uri_reader=uri_reader)

    @property
    def manifest(self) -> Manifest:
        """What it is; the facets grow with the pairs."""
        return self._writer.manifest

    @property
    def generation(self) -> int:
        """Version of the newest stored change; of others' changes, of the newest that has come in."""
        return max(self._writer.generation, self._feed.generation) if self._feed else self._writer.generation

    @property
    def seen(self) -> int:
        """Version of the newest change that BM25 sees, at least; cheap."""
        return self._feed.generation if self._feed else self._lexical.generation

    @property
    def fingerprint(self) -> str:
        """Names the content that is seen now: equal fingerprints give equal answers."""
        return _fingerprint(self.manifest, self.generation, self.seen)

    @property
    def num_pairs(self) -> int:
        """How many pairs BM25 sees; cheap."""
        return self._lexical.num_pairs

    def retrieve(self, query: Query) -> Retrieval:
        """The k best pairs, no two of them with the same picture.

        A pair that was deleted or replaced before the call does not come back; one that was stored a second before does.

        Raises:
            InvalidArgument, FailedPrecondition, Unavailable: see `Searcher.search`.
            DataLoss: a stored picture is damaged.
        """
        with self._in_flight:
            gone: set[tuple[str, int]] = set()
            while True:
                # Taken before the search begins: what is dropped from it is seen by every search that begins later.
                recent, stored, seen = self._recent, self.generation, self.seen
                manifest, vocabulary = self._writer.manifest, self._writer.vocabulary
                result = self._searcher.search(
                    query, manifest=manifest, vocabulary=vocabulary, is_current=partial(_is_current, recent, gone)
                )
                failed_legs = dict(result.failed_legs)
                neighbors = self._neighbors(query, result, gone, failed_legs)
                if neighbors is not None:
                    return Retrieval(
                        neighbors=tuple(neighbors),
                        query=result.query,
                        method=query.method,
                        shortfall_reason=result.shortfall_reason,
                        generation=stored if query.method is Method.CLIP else min(stored, seen),
                        fingerprint=_fingerprint(manifest, stored, seen),
                        failed_legs=failed_legs,
                        leg_seconds=result.leg_seconds,
                    )

    def upsert(self, pairs: Sequence[NewPair]) -> tuple[list[Upserted], int]:
        """Add or replace pairs; see `PairWriter.upsert`. Durable on return, and found within a second.

        Raises:
            Unavailable: the lexical index is too far behind and cannot catch up.
        """
        with self._in_flight:
            self._wait_for_index()
            return self._writer.upsert(pairs)

    def delete(self, pair_ids: Sequence[str]) -> tuple[int, int]:
        """Remove pairs; see `PairWriter.delete`. On return they are found no more."""
        with self._in_flight:
            return self._writer.delete(pair_ids)

    def get(self, pair_id: str, *, with_image: bool = False, with_embedding: bool = False) -> WholePair:
        """One pair.

        Raises:
            NotFound: there is none.
            DataLoss: its picture is damaged.
        """
        with self._in_flight:
            while True:
                there = self.store.get([pair_id], with_embeddings=with_embedding).get(pair_id)
                if there is None:
                    raise NotFound(f"pair_id: knowledge base {self.name!r} has no pair {pair_id!r}")
                pair = there.pair
                try:
                    image = self.images.read(pair.image_sha256) if with_image and pair.image_sha256 else b""
                except DataLoss as error:
                    if self._is_still_there(pair):
                        raise DataLoss(f"pair {pair_id!r}: {error.description}") from error
                    continue
                return WholePair(pair=pair, image=image, embedding=there.embedding if with_embedding else None)

    def page(
        self, *, after: str = "", limit: int = 100, filter: PairFilter = _EVERYTHING
    ) -> tuple[list[StoredPair], str]:
        """Pairs in a fixed order from the token `after` on, and the token of the next page; "" begins and ends.

        Raises:
            InvalidArgument: the limit is not 1 to 1,000.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidArgument("page_size", f"{limit} is not between 1 and {MAX_PAGE}")
        with self._in_flight:
            return self.store.page(after=after, limit=limit, filter=filter)

    def stats(self) -> Stats:
        """Sizes and state; walks over the files."""
        with self._in_flight:
            image_bytes = self.images.num_bytes
            return Stats(
                num_pairs=self.store.count(),
                num_embeddings=self.store.count(with_embedding=True) if self.manifest.embedding_size else 0,
                num_indexed_pairs=self._lexical.num_pairs,
                num_images=self.images.num_images,
                image_bytes=image_bytes,
                disk_bytes=image_bytes + sum(num_bytes(self.folder / part) for part in (PAIRS, BM25)),
                stored_generation=self.generation,
                index_generation=self.seen,
            )

    def catch_up(self) -> int:
        """Wait until BM25 sees all that is stored; gives the generation."""
        with self._in_flight:
            return self._projection.catch_up() if self._projection else self.seen

    def build_if_due(self) -> None:
        """`optimize`, if enough has changed since that was done last."""
        if self.manifest.embedding_size and self._debt.is_due(self.num_pairs):
            self.optimize()

    def optimize(self) -> None:
        """Build what makes searching fast, and forget deletions that every replica has seen; blocks.

        Raises:
            RuntimeError: building failed, or the knowledge base is being closed.
        """
        with self._in_flight:
            begun = self._debt.begin()
            reached = self._projection.catch_up() if self._projection else self.seen
            self.store.optimize()
            self._debt.end(begun)
            self.store.drop_tombstones(min(reached, time.time_ns() - TOMBSTONES_KEPT_NS))

    def snapshot(self, folder: Path) -> SnapshotReport:
        """Write a consistent copy into `folder`/<name>/<generation>/ and check it; writers wait for the first part.

        Raises:
            DataLoss: a stored file is damaged, or the snapshot of this generation that was there.
        """
        with self._in_flight:
            try:
                return write_snapshot(
                    folder,
                    pictures=self._images_folder,
                    others_write=self._feed is not None,
                    store=self.store,
                    still=self._writer.lock,
                    state=lambda: (self.manifest, self.generation),
                )
            except SnapshotError as error:
                raise DataLoss(str(error)) from error

    def close(self) -> None:
        """Wait for the calls under way and let go of the files; further calls raise NotFound. Building is given up."""
        self.store.stop_building()
        if self._in_flight.close():
            self._resources.close()

    def _written(self, versions: Mapping[str, int]) -> None:
        seen = self.seen
        self._debt.add(len(versions))
        with self._noting:
            self._recent = {i: version for i, version in self._recent.items() if version > seen} | dict(versions)
        if self._projection:
            self._projection.wake()

    def _learn(self, changes: Sequence[Change]) -> None:
        """Before the index has changes of others: their facets are known when the pairs are found."""
        self._writer.learn([change.pair.facets for change in changes if change.pair is not None])

    def _forget_seen(self) -> None:
        """Another replica's clock may be behind ours: what we wrote must not hide what it writes for longer than it has to."""
        seen = self.seen
        with self._noting:
            self._recent = {i: version for i, version in self._recent.items() if version > seen}

    def _wait_for_index(self) -> None:
        if self._projection is None or len(self._recent) < MAX_BACKLOG:
            return
        try:
            self._projection.catch_up()
        except Exception as error:
            raise Unavailable(
                f"knowledge base {self.name!r}: BM25 cannot keep up with the changes ({error})"
            ) from error

    def _neighbors(
        self, query: Query, result: SearchResult, gone: set[tuple[str, int]], failed_legs: dict[Method, str]
    ) -> list[Neighbor] | None:
        """The results with their pictures; None, and more is `gone`, where pairs have vanished during the search."""
        num_gone = len(gone)
        pairs = [found.pair for found in result.found]
        if self._feed and pairs:
            try:
                there = self.store.get([pair.pair_id for pair in pairs])
                gone |= {(p.pair_id, p.version) for p in pairs if not _holds(there, p)}
            except (Unavailable, DeadlineExceeded) as error:  # what this replica knows is better than nothing
                failed_legs.setdefault(Method.CLIP, error.description)
        neighbors: list[Neighbor] = []
        for rank, found in enumerate(result.found, start=1):
            pair = found.pair
            try:
                pair, image = (pair, b"") if query.omit_images else self._with_image(pair)
            except DataLoss as error:
                if self._is_still_there(pair):
                    raise DataLoss(f"pair {pair.pair_id!r}: {error.description}") from error
                gone.add((pair.pair_id, pair.version))
                continue
            embedding = result.embeddings.get(pair.pair_id) if query.include_embeddings else None
            neighbors.append(
                Neighbor(pair=pair, image=image, score=found.score, rank=rank, legs=found.legs, embedding=embedding)
            )
        return neighbors if len(gone) == num_gone else None

    def _with_image(self, pair: StoredPair) -> tuple[StoredPair, bytes]:
        if pair.image_sha256:
            return pair, self.images.read(pair.image_sha256)
        if self._read_uri is None:
            return pair, b""
        try:
            image = self._read_uri(pair.image_uri)
            picture = take_in(image) if image else None
        except (OSError, ImageError, ServiceError) as error:
            _LOG.warning("uri_unreadable", extra={"pair_id": pair.pair_id, "reason": type(error).__name__})
            return pair, b""
        return (replace(pair, image_format=picture.format), picture.image) if picture else (pair, b"")

    def _is_still_there(self, pair: StoredPair) -> bool:
        return _holds(self.store.get([pair.pair_id]), pair)


def _holds(there: Mapping[str, Scored], pair: StoredPair) -> bool:
    found = there.get(pair.pair_id)
    return found is not None and found.pair.version == pair.version


def _is_current(recent: Mapping[str, int], gone: set[tuple[str, int]], pair: StoredPair | Brief) -> bool:
    return recent.get(pair.pair_id, 0) <= pair.version and (pair.pair_id, pair.version) not in gone


def _fingerprint(manifest: Manifest, stored: int, seen: int) -> str:
    return hashlib.sha256(f"{manifest.uuid} {stored} {seen}".encode()).hexdigest()
