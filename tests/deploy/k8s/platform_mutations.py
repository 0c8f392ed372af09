"""Mutations of what others do for the stack: Qdrant's limits, admission, autoscalers."""

from __future__ import annotations

from tests.deploy.k8s.mutations import breaks, configured, deployment
from tests.deploy.k8s.rendering import OTHERWISE, Manifest, Manifests, named


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


@breaks("autoscaling")
def replicas_set_as_well(m: Manifests) -> None:
    deployment(m, "retrieval")["replicas"] = 2


@breaks("autoscaling")
def scaled_to_nothing(m: Manifests) -> None:
    named(m, "ScaledObject", "triton")["spec"]["minReplicaCount"] = 0


@breaks("autoscaling")
def scaled_down_at_once(m: Manifests) -> None:
    scaled = named(m, "ScaledObject", "generator")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    scaled["behavior"]["scaleDown"]["stabilizationWindowSeconds"] = 0


@breaks("autoscaling", overlay=OTHERWISE)
def scaled_down_by_processors_at_once(m: Manifests) -> None:
    named(m, "HorizontalPodAutoscaler", "generator")["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] = 0


@breaks("autoscaling")
def falls_back_to_less(m: Manifests) -> None:
    named(m, "ScaledObject", "triton")["spec"]["fallback"]["replicas"] = 1


@breaks("autoscaling")
def forgets_what_was_needed(m: Manifests) -> None:
    del named(m, "ScaledObject", "generator")["spec"]["fallback"]["behavior"]


@breaks("autoscaling")
def by_processors_alone(m: Manifests) -> None:
    del named(m, "ScaledObject", "retrieval")["spec"]["triggers"][0]


@breaks("autoscaling")
def no_answer_is_no_demand(m: Manifests) -> None:
    named(m, "ScaledObject", "retrieval")["spec"]["triggers"][0]["metadata"]["ignoreNullValues"] = "true"


@breaks("autoscaling")
def scaled_by_two(m: Manifests) -> None:
    spec = {"scaleTargetRef": named(m, "ScaledObject", "retrieval")["spec"]["scaleTargetRef"]}
    spec |= {"minReplicas": 2, "maxReplicas": 8, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}}}
    m.append({"kind": "HorizontalPodAutoscaler", "metadata": {"name": "retrieval"}, "spec": spec})


def signing(m: Manifests) -> Manifest:
    """The spec of the policy of signatures."""
    return named(m, "NamespacedImageValidatingPolicy", "signed-images")["spec"]


@breaks("signatures", overlay=OTHERWISE)
def images_of_others_pass(m: Manifests) -> None:
    signing(m)["matchImageReferences"][0]["glob"] = "registry.example.com/reimagen/*"


@breaks("signatures", overlay=OTHERWISE)
def told_and_not_denied(m: Manifests) -> None:
    signing(m)["validationActions"] = ["Audit"]


@breaks("signatures", overlay=OTHERWISE)
def passes_while_nobody_decides(m: Manifests) -> None:
    signing(m)["failurePolicy"] = "Ignore"


@breaks("signatures", overlay=OTHERWISE)
def init_containers_pass(m: Manifests) -> None:
    del signing(m)["validations"][1]


@breaks("signatures", overlay=OTHERWISE)
def models_pass(m: Manifests) -> None:
    signing(m)["images"][0]["expression"] = "[]"


@breaks("signatures", overlay=OTHERWISE)
def any_signature_will_do(m: Manifests) -> None:
    validation = signing(m)["validations"][0]
    validation["expression"] = validation["expression"].replace("> 0", ">= 0")


@breaks("schema", overlay=OTHERWISE)
def unknown_field_of_a_policy(m: Manifests) -> None:
    signing(m)["validationAction"] = ["Deny"]
