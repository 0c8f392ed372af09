"""The rule about Qdrant's limits: they are there, Qdrant knows their names, and what retrieval asks for stays within them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from qdrant_client import models

from retrieval_svc.knowledge_base import MAX_PAGE
from retrieval_svc.legs import MAX_CANDIDATES
from retrieval_svc.pairs import PairFilter
from retrieval_svc.payload import BOOL_FIELDS, INTEGER_FIELDS, KEYWORD_FIELDS, conditions
from retrieval_svc.point_store import BATCH
from retrieval_svc.settings import RetrievalSettings
from retrieval_svc.sparse import _TIE_WINDOW
from retrieval_svc.vectors_server import _MAX_FACET_TERMS
from tests.deploy.k8s.rendering import Manifests, environment, pods
from tests.deploy.k8s.workload_rules import settings_of

STRICT, QUOTAS = "QDRANT__STORAGE__COLLECTION__STRICT_MODE__", "QDRANT__STORAGE__QUOTAS__"
ASKED = {  # at most, of one call
    "a page of pairs": MAX_PAGE,
    "a batch of points": BATCH,
    "the best of a leg": MAX_CANDIDATES,
    "the best of a leg, with its ties": _TIE_WINDOW * MAX_CANDIDATES,
    "facets": _MAX_FACET_TERMS,
}
EVERYTHING = PairFilter(
    facets={"style": frozenset({"noto"})},
    licenses=frozenset({"MIT"}),
    sources=frozenset({"noto"}),
    safe=True,
    excluded_pair_ids=frozenset({"a"}),
    excluded_contents=frozenset({"b"}),
    excluded_names=frozenset({"c"}),
)


def limits(manifests: Manifests) -> Iterator[str]:
    """Strict mode of new collections and a node's quotas, by the models of Qdrant's own client, which refuse unknown names."""
    found = {pod.owner: pod.containers[0] for pod in pods(manifests)}
    variables = environment(found["StatefulSet/qdrant"], manifests)
    try:
        strict = models.StrictModeConfig(**_section(variables, STRICT))
        quotas = models.QuotaConfig(**_section(variables, QUOTAS))
    except ValidationError as error:
        yield f"StatefulSet/qdrant: {error}"
        return
    if (
        not strict.enabled
        or strict.unindexed_filtering_retrieve is not False
        or strict.unindexed_filtering_update is not False
    ):
        yield "StatefulSet/qdrant: takes whatever it is asked"
    told: RetrievalSettings = settings_of(found["Deployment/retrieval"], manifests)
    yield from _too_small("limit", strict.max_query_limit, ASKED)
    yield from _too_small("timeout", strict.max_timeout, {"a call": told.qdrant_timeout_s})
    yield from _too_small("hnsw_ef", strict.search_max_hnsw_ef, {"a search": told.qdrant_hnsw_ef})
    yield from _too_small("oversampling", strict.search_max_oversampling, {"a search": told.qdrant_oversampling})
    if strict.search_allow_exact is False:
        yield "StatefulSet/qdrant: refuses to look exactly, which retrieval does before it says that there is no more"
    caps = (quotas.max_resident_memory_percent, quotas.max_disk_usage_percent)
    if not quotas.enabled or not all(cap and 50 <= cap <= 95 for cap in caps) or not quotas.release_margin_percent:
        yield f"StatefulSet/qdrant: its quotas are {quotas}"
    if left := filtered() - {*KEYWORD_FIELDS, *BOOL_FIELDS, *INTEGER_FIELDS}:
        yield f"retrieval filters by {sorted(left)}, which have no index"


def filtered() -> set[str]:
    """The fields of the payload that retrieval filters by."""
    wanted = conditions(EVERYTHING, names=frozenset({"dog"}), level=1, is_deleted=False, has_embedding=True)
    return {field for field, _ in (*wanted.must, *wanted.must_not)} | {"deleted", "version"}


def _section(variables: dict[str, str], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix).lower(): value for name, value in variables.items() if name.startswith(prefix)}


def _too_small(name: str, cap: float | None, asked: dict[str, float] | dict[str, int]) -> Iterator[str]:
    if cap is None:
        yield f"StatefulSet/qdrant: no bound of {name}"
        return
    yield from (
        f"StatefulSet/qdrant: {name} {cap:g}, and {what} asks for {n:g}" for what, n in asked.items() if n > cap
    )
