"""The write path of a knowledge base: validate, take pictures in, embed, store the pictures, store the pairs.

What is returned is durable. Pictures are stored before the pairs that need them and unlinked after the last pair has
gone; both are noted beforehand, so that a process that is killed leaves neither a pair without its picture nor a picture
that nobody knows of.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.images import ImageError
from common.service.errors import ResourceExhausted
from retrieval_svc.image_store import ImageStore
from retrieval_svc.manifest import Manifest, extended, write_manifest
from retrieval_svc.new_pairs import Draft, FacetSpellings, PairRejected, UriReader, begin_draft, laid_down
from retrieval_svc.pairs import NewPair, Outcome, PairStore, Scored, Upserted, has_control_characters
from retrieval_svc.query_vector import PictureEmbedder

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOG = logging.getLogger(__name__)


class PairWriter:
    """Changes one knowledge base; safe to use from several threads, which then take turns."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        store: PairStore,
        images: ImageStore,
        embedder: PictureEmbedder,
        read_uri: UriReader | None,
        on_written: Callable[[Mapping[str, int]], None],
    ) -> None:
        """`on_written` is told ids and versions of what has been stored or deleted, before anybody else hears of it."""
        self.manifest = manifest
        self.vocabulary = manifest.vocabulary()
        self.generation = store.latest_version()
        self.lock = threading.RLock()
        self._spellings = FacetSpellings.of(manifest)
        self._folder = folder
        self._store = store
        self._images = images
        self._embedder = embedder
        self._read_uri = read_uri
        self._on_written = on_written
        self._num_writes = 0
        self._last_version = self.generation

    def upsert(self, pairs: Sequence[NewPair]) -> tuple[list[Upserted], int]:
        """Add or replace pairs; the outcome of each, in order, and the generation afterwards.

        Raises:
            ResourceExhausted: the disk is full.
            FailedPrecondition: pictures were to be embedded, by another model than the one that made the embeddings.
        """
        outcomes: dict[int, Upserted] = {}
        drafts = self._begun(pairs, self._known_pictures(pairs), outcomes)
        with self._naming_a_full_disk():
            self._extend_vocabulary([draft.new.facets for draft in drafts])
            for draft in drafts:
                draft.pair = laid_down(draft, self.vocabulary, self._spellings)
            num_writes = self._num_writes
            there = self._there(drafts)
            drafts = self._embedded(drafts, there, outcomes)
            with self.lock:
                if self._num_writes != num_writes:  # somebody else has written meanwhile
                    there = self._there(drafts)
                    drafts = self._embedded(drafts, there, outcomes)
                self._write(self._to_write(drafts, there, outcomes), there)
                return [outcomes[position] for position in range(len(pairs))], self.generation

    def delete(self, pair_ids: Sequence[str]) -> tuple[int, int]:
        """Remove pairs and the pictures that no other pair has; how many were there, and the generation afterwards.

        Raises:
            ResourceExhausted: the disk is full.
        """
        with self._naming_a_full_disk(), self.lock:
            there = self._store.get(list(dict.fromkeys(pair_ids)))
            if not there:
                return 0, self.generation
            self._images.note_maybe_unused(sorted({scored.pair.content for scored in there.values()}))
            first = self._versions(len(there), above=_newest(there.values()))
            self._store.delete(list(there), first)
            self.generation = first + len(there) - 1
            self._on_written({pair_id: first + i for i, pair_id in enumerate(there)})
            self.sweep()
            return len(there), self.generation

    def sweep(self, in_use: frozenset[str] = frozenset()) -> None:
        """Unlink pictures that have lost their last pair; what cannot be done now is done at the next change.

        The store is not asked about those that are known to be `in_use`.
        """

        def used(contents: Sequence[str]) -> set[str]:
            unknown = [content for content in contents if content not in in_use]
            known = set(in_use.intersection(contents))
            return known | self._store.contents_in_use(unknown) if unknown else known

        try:
            with self.lock:
                self._images.sweep(used)
        except Exception:  # the change itself is stored, and must be reported as such
            _LOG.exception("sweep_failed", extra={"knowledge_base": self.manifest.name})

    def _known_pictures(self, pairs: Sequence[NewPair]) -> dict[str, str]:
        """Formats of the pictures, by sha256, that pairs of these ids have: the same bytes need not be looked at again."""
        ids = [new.pair_id for new in pairs if new.image and not has_control_characters(new.pair_id)]
        there = self._store.get(list(dict.fromkeys(ids))) if ids else {}
        return {scored.pair.image_sha256: scored.pair.image_format for scored in there.values()}

    def _begun(
        self, pairs: Sequence[NewPair], known_pictures: Mapping[str, str], outcomes: dict[int, Upserted]
    ) -> list[Draft]:
        drafts: list[Draft] = []
        for position, new in enumerate(pairs):
            try:
                drafts.append(
                    begin_draft(
                        new,
                        position,
                        manifest=self.manifest,
                        spellings=self._spellings,
                        read_uri=self._read_uri if self._embedder.is_ready else None,
                        known_pictures=known_pictures,
                    )
                )
            except PairRejected as rejected:
                outcomes[position] = _rejection(new, rejected.field, rejected.reason)
        return drafts

    def learn(self, facets: Sequence[Mapping[str, str]]) -> None:
        """Take the values of these facets into the vocabulary: other replicas have stored pairs that have them.

        Raises:
            OSError: the disk is full.
        """
        self._extend_vocabulary(facets)

    def _extend_vocabulary(self, facets: Sequence[Mapping[str, str]]) -> None:
        """Before the pairs: whoever reads them finds their facets known."""
        if not self._spellings.new_values(facets):
            return
        with self.lock:
            new_values = self._spellings.new_values(facets)  # again: another thread may have been faster
            if new_values:
                manifest = extended(self.manifest, new_values)
                write_manifest(self._folder, manifest)
                self._spellings = FacetSpellings.of(manifest)
                self.vocabulary = manifest.vocabulary()
                self.manifest = manifest

    def _there(self, drafts: Sequence[Draft]) -> dict[str, Scored]:
        ids = list(dict.fromkeys(draft.pair.pair_id for draft in drafts))
        return self._store.get(ids, with_embeddings=self.manifest.embedding_size > 0) if ids else {}

    def _is_same(self, draft: Draft, other: Scored | None) -> bool:
        """Whether nothing would change."""
        if other is None or replace(other.pair, version=0) != draft.pair:
            return False
        if draft.embedding is not None:
            return other.embedding is not None and _is_alike(draft.embedding, other.embedding)
        return other.embedding is not None or draft.look is None or not self._embedder.is_ready

    def _embedded(self, drafts: list[Draft], there: Mapping[str, Scored], outcomes: dict[int, Upserted]) -> list[Draft]:
        """`drafts` after embedding those that need it, in one call; without those whose picture cannot be drawn."""
        if not self._embedder.is_ready:
            return drafts
        changed = [draft for draft in drafts if not self._is_same(draft, there.get(draft.pair.pair_id))]
        blank = [draft for draft in changed if draft.embedding is None and draft.look is not None]
        if not blank:
            return drafts
        for draft, embedding in zip(blank, self._looks(blank, outcomes), strict=True):
            draft.embedding = embedding
        return [draft for draft in drafts if draft.position not in outcomes]

    def _looks(self, blank: Sequence[Draft], outcomes: dict[int, Upserted]) -> list[np.ndarray | None]:
        files = [(draft.look.image, draft.look.format) for draft in blank if draft.look is not None]
        try:
            return list(self._embedder.pictures(files))
        except ImageError:
            found: list[np.ndarray | None] = []  # one of them cannot be drawn: which?
            for draft, file in zip(blank, files, strict=True):
                try:
                    found.append(self._embedder.pictures([file])[0])
                except ImageError as error:
                    field = "image" if draft.picture is not None else "image_uri"
                    outcomes[draft.position] = _rejection(draft.new, field, str(error).removeprefix("image: "))
                    found.append(None)
            return found

    def _to_write(
        self, drafts: Sequence[Draft], there: Mapping[str, Scored], outcomes: dict[int, Upserted]
    ) -> dict[str, Draft]:
        """The drafts that change something, by id: of two of the same id the later one."""
        chosen: dict[str, Draft] = {}
        for draft in drafts:
            pair_id = draft.pair.pair_id
            earlier = chosen.get(pair_id)
            before = (
                Scored(pair=earlier.pair, score=0.0, embedding=earlier.embedding) if earlier else there.get(pair_id)
            )
            if self._is_same(draft, before):
                outcome = Outcome.UNCHANGED
            else:
                outcome = Outcome.CREATED if before is None else Outcome.REPLACED
                chosen[pair_id] = draft
            outcomes[draft.position] = Upserted(pair_id=pair_id, outcome=outcome)
        return chosen

    def _write(self, chosen: Mapping[str, Draft], there: Mapping[str, Scored]) -> None:
        if not chosen:
            return
        drafts = list(chosen.values())
        replaced = {there[pair_id].pair.content for pair_id in chosen if pair_id in there}
        self._images.note_maybe_unused(sorted(replaced | {draft.pair.content for draft in drafts}))
        self._images.put_all([draft.picture.image for draft in drafts if draft.picture is not None])
        first = self._versions(len(drafts), above=_newest(there[i] for i in chosen if i in there))
        stored = [replace(draft.pair, version=first + i) for i, draft in enumerate(drafts)]
        self._store.upsert(stored, [draft.embedding for draft in drafts])
        self._images.confirm([draft.picture.image for draft in drafts if draft.picture is not None])
        self.generation = stored[-1].version
        self._on_written({pair.pair_id: pair.version for pair in stored})
        self.sweep(in_use=frozenset(pair.content for pair in stored))

    def _versions(self, num: int, *, above: int) -> int:
        """The first of `num` versions that nothing has had, nor a change that failed halfway.

        They are `above` what is replaced: another replica's clock, which gave that version, may be ahead of this one.
        """
        first = max(time.time_ns(), self._last_version + 1, above + 1)
        self._last_version = first + num - 1
        self._num_writes += 1
        return first

    @contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise ResourceExhausted(f"knowledge base {self.manifest.name!r}: the disk is full ({error})") from error


def _newest(there: Iterable[Scored]) -> int:
    return max((scored.pair.version for scored in there), default=0)


def _rejection(new: NewPair, field: str, reason: str) -> Upserted:
    return Upserted(pair_id=new.pair_id, outcome=Outcome.REJECTED, field=field, reason=reason)


def _is_alike(given: np.ndarray, stored: np.ndarray) -> bool:
    """Whether an embedding is the stored one, which is normalized and may be kept in half precision."""
    wide = given.astype(np.float64)
    return bool(np.allclose(wide / np.linalg.norm(wide), stored, rtol=2e-3, atol=1e-4))
