"""A knowledge base: gamma(p, B) of the Re-Imagen paper, the top-k pairs of B for a prompt p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from common.service.errors import FailedPrecondition, InvalidArgument
from retrieval_svc.bm25 import Hit, Hits, Lookup
from retrieval_svc.index_folder import IndexFolder, open_index
from retrieval_svc.query import UnderstoodPrompt

DEFAULT_K, MAX_K = 2, 64
MAX_EXCLUDED_PAIRS = 1000


class Method(Enum):
    """How pairs are scored."""

    BM25 = "bm25"
    CLIP = "clip"
    HYBRID = "hybrid"


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One pair of the knowledge base; `rank` counts from 1, the best."""

    pair_id: str
    caption: str
    entity: str
    image: bytes
    image_format: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What a prompt found: k neighbors, best first, or fewer with `shortfall_reason`."""

    neighbors: tuple[Neighbor, ...]
    query: UnderstoodPrompt
    method: Method
    shortfall_reason: str


class KnowledgeBase:
    """One index, opened; safe to use from several threads."""

    def __init__(self, index: IndexFolder) -> None:
        self.name = index.manifest.name
        self.fingerprint = index.manifest.fingerprint
        self._vocabulary = index.manifest.vocabulary()
        self._bm25 = index.bm25
        self._images = index.images

    @classmethod
    def open(cls, folder: Path) -> KnowledgeBase:
        """Open the index in `folder`.

        Raises:
            IndexFolderError: it is missing, incomplete or of another format; the message names it.
        """
        return cls(open_index(folder))

    @property
    def num_pairs(self) -> int:
        """How many pairs it holds."""
        return self._bm25.num_pairs

    def retrieve(
        self,
        prompt: str,
        *,
        k: int = DEFAULT_K,
        method: Method = Method.BM25,
        excluded_pair_ids: frozenset[str] = frozenset(),
        exclude_exact: bool = False,
    ) -> Retrieval:
        """The k best pairs for `prompt`, no two of them with the same picture.

        Args:
            prompt: what is to be drawn; facets and scene phrases in it do not select pairs, they only order
                equals.
            k: how many, 1 to 64.
            method: how pairs are scored.
            excluded_pair_ids: pairs that must not come back, nor their pictures under another id.
            exclude_exact: leave out the pair that the prompt asks for (its entity, its facets) likewise.

        Raises:
            InvalidArgument: the prompt, k or the number of excluded pairs cannot be.
            FailedPrecondition: there is no index for `method`.
            DataLoss: a stored picture is damaged.
        """
        if not 1 <= k <= MAX_K:
            raise InvalidArgument("k", f"{k} is not between 1 and {MAX_K}")
        if len(excluded_pair_ids) > MAX_EXCLUDED_PAIRS:
            raise InvalidArgument(
                "excluded_pair_ids",
                f"holds {len(excluded_pair_ids)} ids; at most {MAX_EXCLUDED_PAIRS} are taken",
            )
        query = self._vocabulary.understand(prompt)
        if method is not Method.BM25:
            raise FailedPrecondition(
                f"method {method.name}: knowledge base {self.name!r} has no CLIP index; it answers BM25"
            )
        hits = self._bm25.search(
            Lookup(
                entity=query.entity,
                details=query.details,
                facets=query.facets,
                k=k,
                excluded_pair_ids=excluded_pair_ids,
                exclude_exact=exclude_exact,
            )
        )
        neighbors = tuple(self._neighbor(hit, rank) for rank, hit in enumerate(hits.hits, start=1))
        return Retrieval(neighbors=neighbors, query=query, method=method, shortfall_reason=_shortfall(query, k, hits))

    def close(self) -> None:
        """Let go of the files."""
        self._images.close()

    def _neighbor(self, hit: Hit, rank: int) -> Neighbor:
        stored = hit.payload
        return Neighbor(
            pair_id=stored["pair_id"],
            caption=stored["caption"],
            entity=stored["entity"],
            image=self._images.read(offset=stored["offset"], length=stored["length"], sha256=stored["sha256"]),
            image_format=stored["image_format"],
            facets=stored["facets"],
            author=stored["author"],
            source=stored["source"],
            license=stored["license"],
            score=hit.score,
            rank=rank,
        )


def _shortfall(query: UnderstoodPrompt, k: int, hits: Hits) -> str:
    if len(hits.hits) == k:
        return ""
    words = ", ".join((query.entity, *query.details))
    left_out = [f"{n} {what}" for n, what in ((hits.num_excluded, "excluded"), (hits.num_duplicates, "duplicate")) if n]
    also = f"; left out: {', '.join(left_out)}" if left_out else ""
    return f"asked for {k}, found {len(hits.hits)}: no other pair shares a word with {words!r}{also}"
