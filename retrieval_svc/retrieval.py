"""What a caller asks of a knowledge base, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from retrieval_svc.pairs import PairFilter, StoredPair
from retrieval_svc.query import UnderstoodPrompt

DEFAULT_K, MAX_K = 2, 64
MAX_EXCLUDED = 1000
RRF_CONSTANT = 60  # Cormack, Clarke and Buettcher 2009, section 2: the sum of 1 / (60 + rank)


class Method(Enum):
    """How pairs are scored."""

    BM25 = "bm25"
    CLIP = "clip"
    HYBRID = "hybrid"


@dataclass(frozen=True, kw_only=True)
class QueryWeights:
    """Parts of text, picture and embedding in the vector that the CLIP leg looks for."""

    text: float = 1.0
    image: float = 1.0
    embedding: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Query:
    """One lookup.

    Attributes:
        prompt: what is to be drawn; may be empty for CLIP with a picture or an embedding.
        image: bytes of a picture file to look for. embedding: float32 [D] to look for.
        weights: how prompt, picture and embedding mix; what is not given has no part.
        filter: applied inside the search. excluded_entities: names.
        exclude_exact: leave out the pair that the prompt asks for (its entity, its facets).
        diversity: of maximal marginal relevance, 0 to 1.
        near_duplicate_similarity: cosine from which two pairs are one; 0: only the same picture is.
    """

    prompt: str = ""
    k: int = DEFAULT_K
    method: Method = Method.BM25
    image: bytes = b""
    embedding: np.ndarray | None = None
    weights: QueryWeights = QueryWeights()
    filter: PairFilter = field(default_factory=PairFilter)
    excluded_entities: frozenset[str] = frozenset()
    exclude_exact: bool = False
    diversity: float = 0.0
    near_duplicate_similarity: float = 0.0
    include_embeddings: bool = False
    omit_images: bool = False


@dataclass(frozen=True, kw_only=True)
class LegScore:
    """What one leg said of a pair; `rank` counts from 1."""

    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One pair found; `image` is empty where it was not asked for or is not stored."""

    pair: StoredPair
    image: bytes
    score: float
    rank: int
    legs: Mapping[Method, LegScore] = field(default_factory=dict)
    embedding: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What a query found: k neighbors, best first, or fewer with `shortfall_reason`.

    Attributes:
        query: how the prompt was understood; None where there was none.
        generation: version of the newest change that the answer has seen.
        failed_legs: legs of HYBRID that could not answer, with the reason.
        leg_seconds: time that each leg that was asked took in its index.
    """

    neighbors: tuple[Neighbor, ...]
    query: UnderstoodPrompt | None
    method: Method
    shortfall_reason: str
    generation: int
    fingerprint: str
    failed_legs: Mapping[Method, str] = field(default_factory=dict)
    leg_seconds: Mapping[Method, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Sizes and state.

    Attributes:
        num_indexed_pairs: those that the lexical index holds; equal to num_pairs once it has caught up.
        disk_bytes: of all files of the knowledge base.
        stored_generation, index_generation: versions of the newest change stored, and of the newest that BM25 sees.
    """

    num_pairs: int
    num_embeddings: int
    num_indexed_pairs: int
    num_images: int
    image_bytes: int
    disk_bytes: int
    stored_generation: int
    index_generation: int


@dataclass(frozen=True, kw_only=True)
class WholePair:
    """A stored pair; `image` is empty, and `embedding` (float32 [D]) None, where not asked for or not there."""

    pair: StoredPair
    image: bytes = b""
    embedding: np.ndarray | None = None
