"""What retrieval counts beside its calls, for Prometheus. No label holds what a caller can think up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.service.status import code_of
from retrieval_svc.retrieval import Method, Retrieval

_DURATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_RESULT_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100)
MAX_INDEXES = 50  # that have a label of their own
OTHER = "other"
LEGS: Mapping[Method, str] = {Method.BM25: "bm25", Method.CLIP: "vector", Method.HYBRID: "fused"}


@dataclass(frozen=True, kw_only=True)
class IndexFigures:
    """What one knowledge base's index holds; `generation`, of what is stored, and `seen`, of what BM25 sees of it, are
    nanoseconds since 1970."""

    name: str
    documents: int
    generation: int
    seen: int


class RetrievalMetrics:
    """Lookups by leg and outcome, their time, legs that failed, pairs found; the size and age of each index."""

    def __init__(self, registry: CollectorRegistry, indexes: Callable[[], Iterable[IndexFigures]] = tuple) -> None:
        """`indexes` is asked at every scrape."""
        self.requests = Counter(
            "reimagen_retrieval_requests",
            "Lookups by what answered (bm25, vector, or both fused) and how they ended.",
            ("leg", "outcome"),
            registry=registry,
        )
        self.duration_s = Histogram(
            "reimagen_retrieval_duration_seconds",
            "Time of a leg's searches in one lookup, whether it is asked alone or beside the other; fused: of the whole"
            " lookup with both, from its admission to its message.",
            ("leg", "outcome"),
            buckets=_DURATION_BUCKETS_S,
            registry=registry,
        )
        self.leg_failures = Counter(
            "reimagen_retrieval_leg_failures",
            "Legs that could not answer, so that the other answered alone.",
            ("leg", "reason"),
            registry=registry,
        )
        self.results = Histogram(
            "reimagen_retrieval_results", "Pairs found by a lookup.", buckets=_RESULT_BUCKETS, registry=registry
        )
        self.changed_pairs = Counter(
            "reimagen_retrieval_changed_pairs",
            "Pairs that were to be changed, by what became of them.",
            ("outcome",),
            registry=registry,
        )
        registry.register(_Indexes(indexes))

    def count_lookup(self, leg: str, outcome: str, elapsed_s: float) -> None:
        """A lookup has ended; `leg` is what answered it, `OTHER` where it asked for no method that there is."""
        self.requests.labels(leg, outcome).inc()
        if leg == LEGS[Method.HYBRID]:
            self.duration_s.labels(leg, outcome).observe(elapsed_s)

    def count_legs(self, retrieval: Retrieval) -> None:
        """The legs of a lookup that was answered."""
        for method, elapsed_s in retrieval.leg_seconds.items():
            outcome = "error" if method in retrieval.failed_legs else "ok"
            self.duration_s.labels(LEGS[method], outcome).observe(elapsed_s)
        for method, reason in retrieval.failed_legs.items():
            self.leg_failures.labels(LEGS[method], failure_reason(reason)).inc()


class _Indexes(Collector):
    """Gauges of each index; all beyond `MAX_INDEXES` share one label."""

    def __init__(self, indexes: Callable[[], Iterable[IndexFigures]]) -> None:
        self._indexes = indexes

    def collect(self) -> Iterator[Metric]:
        documents = GaugeMetricFamily("reimagen_retrieval_index_documents", "Pairs that BM25 sees.", labels=("index",))
        timestamp = GaugeMetricFamily(
            "reimagen_retrieval_index_generation_timestamp_seconds",
            "When the newest stored change was made.",
            labels=("index",),
        )
        seen = GaugeMetricFamily(
            "reimagen_retrieval_index_seen_timestamp_seconds",
            "When the newest change was made that BM25 sees.",
            labels=("index",),
        )
        named = sorted(self._indexes(), key=lambda figures: figures.name)
        others = named[MAX_INDEXES:]
        for figures in named[:MAX_INDEXES]:
            documents.add_metric((figures.name,), figures.documents)
            timestamp.add_metric((figures.name,), figures.generation / 1e9)
            seen.add_metric((figures.name,), figures.seen / 1e9)
        if others:
            documents.add_metric((OTHER,), sum(figures.documents for figures in others))
            timestamp.add_metric((OTHER,), max(figures.generation for figures in others) / 1e9)
            seen.add_metric((OTHER,), min(figures.seen for figures in others) / 1e9)
        yield documents
        yield timestamp
        yield seen


def outcome_of(error: BaseException) -> str:
    """The label of a lookup that failed: its status code in small letters."""
    return code_of(error).name.lower() if isinstance(error, Exception) else "cancelled"


def failure_reason(reason: str) -> str:
    """The label of why a leg failed: our own faults, or something that is away."""
    return "internal" if reason.startswith("internal error") else "unavailable"
