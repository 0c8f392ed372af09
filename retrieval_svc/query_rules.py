"""What a query may ask: everything that is wrong whatever the knowledge base holds, and what it must hold to answer."""

from __future__ import annotations

import math

import numpy as np

from common.service.errors import FailedPrecondition, InvalidArgument
from retrieval_svc.manifest import Manifest
from retrieval_svc.retrieval import MAX_EXCLUDED, MAX_K, Method, Query


def check_query(query: Query, manifest: Manifest) -> None:
    """Refuse what cannot be answered.

    Raises:
        InvalidArgument: a part is out of range; the field is named as in retrieval.proto.
        FailedPrecondition: the knowledge base has no embeddings, and the query needs them.
    """
    if not 1 <= query.k <= MAX_K:
        raise InvalidArgument("k", f"{query.k} is not between 1 and {MAX_K}")
    for field, value in (
        ("diversity", query.diversity),
        ("near_duplicate_similarity", query.near_duplicate_similarity),
    ):
        if not 0.0 <= value <= 1.0:  # also refuses NaN
            raise InvalidArgument(field, f"{value} is not between 0 and 1")
    for field, excluded, what in (
        ("excluded_pair_ids", query.filter.excluded_pair_ids, "ids"),
        ("excluded_entities", query.excluded_entities | query.filter.excluded_names, "names"),
    ):
        if len(excluded) > MAX_EXCLUDED:
            raise InvalidArgument(field, f"holds {len(excluded)} {what}; at most {MAX_EXCLUDED} are taken")
    _check_vector_parts(query, manifest)
    if manifest.embedding_size == 0:
        _refuse_without_embeddings(query, manifest.name)


def _check_vector_parts(query: Query, manifest: Manifest) -> None:
    if query.method is Method.BM25:
        for field, given in (("query_image", bool(query.image)), ("query_embedding", query.embedding is not None)):
            if given:
                raise InvalidArgument(field, "method BM25 looks for words alone; ask for CLIP or HYBRID")
    parts = {"text": query.weights.text, "image": query.weights.image, "embedding": query.weights.embedding}
    for name, weight in parts.items():
        if not (math.isfinite(weight) and weight >= 0.0):
            raise InvalidArgument(f"query_weights.{name}", f"{weight} is not 0 or more")
    if query.embedding is not None:
        check_embedding("query_embedding", query.embedding, manifest.embedding_size)
    if query.method is Method.BM25:
        return
    given = {"text": bool(query.prompt.strip()), "image": bool(query.image), "embedding": query.embedding is not None}
    if query.method is Method.CLIP and not any(given.values()):
        raise InvalidArgument("prompt", "is empty, and neither picture nor embedding is given")
    if any(given.values()) and not any(parts[name] for name, is_given in given.items() if is_given):
        raise InvalidArgument("query_weights", "all parts that are given have weight 0")


def check_embedding(field: str, embedding: np.ndarray, size: int) -> None:
    """Refuse what is no embedding of this size.

    Raises:
        InvalidArgument: another size, a number that is not finite, or no direction.
    """
    if size and embedding.shape != (size,):
        raise InvalidArgument(field, f"has {embedding.size} numbers; the knowledge base's embeddings have {size}")
    with np.errstate(over="ignore", invalid="ignore"):
        norm = float(np.linalg.norm(embedding.astype(np.float64)))
    if not (math.isfinite(norm) and norm > 0.0):
        raise InvalidArgument(field, f"has norm {norm}; it must be finite and above 0")


def _refuse_without_embeddings(query: Query, name: str) -> None:
    if query.method is not Method.BM25:
        raise FailedPrecondition(
            f"method {query.method.name}: knowledge base {name!r} has no CLIP index; it answers BM25"
        )
    for field, value in (
        ("diversity", query.diversity),
        ("near_duplicate_similarity", query.near_duplicate_similarity),
    ):
        if value:
            raise FailedPrecondition(f"{field}: knowledge base {name!r} has no embeddings to compare pairs by")
