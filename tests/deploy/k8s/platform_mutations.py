"""Mutations of what others do for the stack: Qdrant's limits, admission, autoscalers."""

from __future__ import annotations

from tests.deploy.k8s.mutations import breaks, configured
from tests.deploy.k8s.rendering import Manifests


@breaks("limits")
def not_strict(m: Manifests) -> None:
    configured(m, "qdrant")["QDRANT__STORAGE__COLLECTION__STRICT_MODE__ENABLED"] = "false"


@breaks("limits")
def limit_that_qdrant_does_not_know(m: Manifests) -> None:
    configured(m, "qdrant")["QDRANT__STORAGE__COLLECTION__STRICT_MODE__MAX_LIMIT"] = "100"


@breaks("limits")
def facets_do_not_fit(m: Manifests) -> None:
    configured(m, "qdrant")["QDRANT__STORAGE__COLLECTION__STRICT_MODE__MAX_QUERY_LIMIT"] = "32768"


@breaks("limits")
def search_is_wider_than_allowed(m: Manifests) -> None:
    configured(m, "retrieval")["REIMAGEN_RETRIEVAL_QDRANT_HNSW_EF"] = "1024"


@breaks("limits")
def nothing_exact(m: Manifests) -> None:
    configured(m, "qdrant")["QDRANT__STORAGE__COLLECTION__STRICT_MODE__SEARCH_ALLOW_EXACT"] = "false"


@breaks("limits")
def no_quota_of_the_disk(m: Manifests) -> None:
    del configured(m, "qdrant")["QDRANT__STORAGE__QUOTAS__MAX_DISK_USAGE_PERCENT"]
