"""What the client of the retrieval service takes and gives: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class FacetSpec:
    """A closed vocabulary that prompts may name: `template` holds {value}, e.g. "{value} style".

    `alike`: of a value, others that look like it, the most alike first; their pairs stand in for its own.
    """

    name: str
    template: str
    values: tuple[str, ...] = ()
    alike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KnowledgeBaseInfo:
    """What a knowledge base is; `embedding_size` 0: it answers BM25 alone. `created_at` is RFC 3339."""

    name: str
    facets: tuple[FacetSpec, ...]
    scene_phrases: tuple[str, ...]
    embedding_size: int
    embedding_model: str
    created_at: str


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Sizes and state; see GetKnowledgeBaseStatsResponse in knowledge_base.proto."""

    knowledge_base: KnowledgeBaseInfo
    num_pairs: int
    num_embeddings: int
    num_indexed_pairs: int
    num_images: int
    image_bytes: int
    disk_bytes: int
    stored_generation: int
    index_generation: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A pair to store, with `image` (a file's bytes) or `image_uri`; see NewPair in knowledge_base.proto."""

    pair_id: str
    caption: str
    image: bytes = b""
    image_uri: str = ""
    entity: str = ""
    facets: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    source: str = ""
    license: str = ""
    safe: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredPair(Pair):
    """A pair as it is stored; `image` and `embedding` are empty where not asked for."""

    image_format: str = ""
    image_sha256: str = ""
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class UpsertOutcome:
    """`created`, `replaced`, `unchanged` or `rejected`; of a rejected pair the field at fault and why."""

    pair_id: str
    outcome: str
    field: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checked copy; `path` is on the replica that made it."""

    path: str
    generation: int
    num_pairs: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What pairs must have; for each facet the values of which one. `safe` None asks nothing."""

    facets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    licenses: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    safe: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One lookup; see RetrieveRequest in retrieval.proto.

    Attributes:
        method: `bm25`, `clip` or `hybrid`; empty leaves it to the service.
        weights: parts of text, picture and embedding, in this order; None: equal parts of what is given.
    """

    prompt: str = ""
    k: int = 2
    knowledge_base: str = ""
    method: str = ""
    image: bytes = b""
    embedding: tuple[float, ...] = ()
    weights: tuple[float, float, float] | None = None
    filter: Filter = field(default_factory=Filter)
    excluded_pair_ids: tuple[str, ...] = ()
    excluded_entities: tuple[str, ...] = ()
    exclude_exact: bool = False
    diversity: float = 0.0
    near_duplicate_similarity: float = 0.0
    include_embeddings: bool = False
    omit_images: bool = False


@dataclass(frozen=True, kw_only=True)
class LegScore:
    """What one leg (`bm25` or `clip`) said of a pair."""

    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A pair that was found; rank 1 is the best."""

    pair: StoredPair
    score: float
    rank: int
    legs: Mapping[str, LegScore]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a lookup found, best first; `shortfall_reason` where there are fewer than asked."""

    neighbors: tuple[Neighbor, ...]
    knowledge_base: str
    index_fingerprint: str
    index_generation: int
    method: str
    shortfall_reason: str
    failed_legs: Mapping[str, str]
