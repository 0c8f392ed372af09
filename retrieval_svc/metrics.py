"""What retrieval counts beside its calls, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SEARCH_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_RESULT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64)


class RetrievalMetrics:
    """Searches: their time, how many pairs they found, how often too few; the size of each knowledge base."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.search_s = Histogram(
            "reimagen_retrieval_search_seconds",
            "Time to find and read the pairs, with the wait for a search thread.",
            buckets=_SEARCH_BUCKETS_S,
            registry=registry,
        )
        self.results = Histogram(
            "reimagen_retrieval_results",
            "Pairs found by a search.",
            ("method",),
            buckets=_RESULT_BUCKETS,
            registry=registry,
        )
        self.shortfalls = Counter(
            "reimagen_retrieval_shortfalls",
            "Searches that found fewer pairs than asked.",
            ("method",),
            registry=registry,
        )
        self.pairs = Gauge("reimagen_retrieval_pairs", "Pairs indexed.", ("knowledge_base",), registry=registry)
