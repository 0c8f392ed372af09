"""Protobuf to domain and back, for both servicers and for imports into a running service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from common.corpus import Facet
from common.service.errors import InvalidArgument
from retrieval_svc.manifest import Manifest
from retrieval_svc.pairs import NewPair, Outcome, PairFilter, StoredPair, Upserted
from retrieval_svc.retrieval import DEFAULT_K, Method, Neighbor, Query, QueryWeights, Retrieval

MAX_FILTER_VALUES = 1000

_METHODS: Mapping[int, Method] = {
    pb.METHOD_UNSPECIFIED: Method.BM25,
    pb.METHOD_BM25: Method.BM25,
    pb.METHOD_CLIP: Method.CLIP,
    pb.METHOD_HYBRID: Method.HYBRID,
}
_METHOD_NUMBERS = {Method.BM25: pb.METHOD_BM25, Method.CLIP: pb.METHOD_CLIP, Method.HYBRID: pb.METHOD_HYBRID}
_OUTCOMES = {
    Outcome.CREATED: kb_pb.UpsertResult.OUTCOME_CREATED,
    Outcome.REPLACED: kb_pb.UpsertResult.OUTCOME_REPLACED,
    Outcome.UNCHANGED: kb_pb.UpsertResult.OUTCOME_UNCHANGED,
    Outcome.REJECTED: kb_pb.UpsertResult.OUTCOME_REJECTED,
}
_OUTCOME_OF = {number: outcome for outcome, number in _OUTCOMES.items()}


def method_of(number: int) -> Method:
    """The method; unspecified is BM25.

    Raises:
        InvalidArgument: there is none of that number.
    """
    if number not in _METHODS:
        raise InvalidArgument("method", f"{number} is no method")
    return _METHODS[number]


def query_of(request: pb.RetrieveRequest) -> Query:
    """What is asked.

    Raises:
        InvalidArgument: the method or the filter cannot be.
    """
    weights = QueryWeights()
    if request.HasField("query_weights"):
        given = request.query_weights
        weights = QueryWeights(text=given.text, image=given.image, embedding=given.embedding)
    return Query(
        prompt=request.prompt,
        k=request.k or DEFAULT_K,
        method=method_of(request.method),
        image=request.query_image,
        embedding=_embedding(request.query_embedding),
        weights=weights,
        filter=filter_of(request.filter, excluded_pair_ids=request.excluded_pair_ids),
        excluded_entities=frozenset(request.excluded_entities),
        exclude_exact=request.exclude_exact,
        diversity=request.diversity,
        near_duplicate_similarity=request.near_duplicate_similarity,
        include_embeddings=request.include_embeddings,
        omit_images=request.omit_images,
    )


def filter_of(given: pb.Filter, *, excluded_pair_ids: Sequence[str] = ()) -> PairFilter:
    """What pairs must have.

    Raises:
        InvalidArgument: a facet has no values, or there are too many.
    """
    num_values = len(given.licenses) + len(given.sources) + sum(len(v.values) for v in given.facets.values())
    if num_values > MAX_FILTER_VALUES:
        raise InvalidArgument("filter", f"holds {num_values} values; at most {MAX_FILTER_VALUES} are taken")
    for name, values in given.facets.items():
        if not values.values:
            raise InvalidArgument("filter.facets", f"{name!r} has no values")
    return PairFilter(
        facets={name: frozenset(values.values) for name, values in given.facets.items()},
        licenses=frozenset(given.licenses),
        sources=frozenset(given.sources),
        safe=given.safe if given.HasField("safe") else None,
        excluded_pair_ids=frozenset(excluded_pair_ids),
    )


def retrieve_response(name: str, retrieval: Retrieval) -> pb.RetrieveResponse:
    """What was found in knowledge base `name`."""
    query = retrieval.query
    understood = query and pb.UnderstoodQuery(
        entity=query.entity, details=query.details, facets=dict(query.facets), scene_phrases=query.scene_phrases
    )
    return pb.RetrieveResponse(
        neighbors=[_neighbor(neighbor) for neighbor in retrieval.neighbors],
        knowledge_base=name,
        index_fingerprint=retrieval.fingerprint,
        method=_METHOD_NUMBERS[retrieval.method],
        shortfall_reason=retrieval.shortfall_reason,
        query=understood,
        index_generation=retrieval.generation,
        failed_legs=[
            pb.LegFailure(leg=_METHOD_NUMBERS[leg], reason=reason) for leg, reason in retrieval.failed_legs.items()
        ],
    )


def facets_of(facets: Sequence[kb_pb.Facet]) -> tuple[Facet, ...]:
    """The vocabulary of a new knowledge base."""
    return tuple(
        Facet(
            name=f.name,
            template=f.template,
            values=tuple(f.values),
            alike={value: tuple(others.values) for value, others in f.alike.items()},
        )
        for f in facets
    )


def facet_message(facet: Facet) -> kb_pb.Facet:
    """One facet of a vocabulary."""
    alike = {value: pb.Values(values=others) for value, others in facet.alike.items()}
    return kb_pb.Facet(name=facet.name, template=facet.template, values=facet.values, alike=alike)


def knowledge_base_message(manifest: Manifest) -> kb_pb.KnowledgeBase:
    """What a knowledge base is."""
    return kb_pb.KnowledgeBase(
        name=manifest.name,
        facets=[facet_message(facet) for facet in manifest.facets],
        scene_phrases=manifest.scene_phrases,
        embedding_size=manifest.embedding_size,
        embedding_model=manifest.embedding_model,
        created_at=manifest.created_at,
    )


def new_pair_of(pair: kb_pb.NewPair) -> NewPair:
    """A pair to store."""
    return NewPair(
        pair_id=pair.pair_id,
        caption=pair.caption,
        image=pair.image,
        image_uri=pair.image_uri,
        entity=pair.entity,
        facets=dict(pair.facets),
        author=pair.author,
        source=pair.source,
        license=pair.license,
        safe=pair.safe,
        attributes=dict(pair.attributes),
        embedding=_embedding(pair.embedding),
    )


def new_pair_message(pair: NewPair) -> kb_pb.NewPair:
    """Inverse of `new_pair_of`.

    Raises:
        ValueError, TypeError: a part cannot be written, e.g. a text that is no Unicode.
    """
    return kb_pb.NewPair(
        pair_id=pair.pair_id,
        caption=pair.caption,
        entity=pair.entity,
        image=pair.image,
        image_uri=pair.image_uri,
        facets=dict(pair.facets),
        author=pair.author,
        source=pair.source,
        license=pair.license,
        safe=pair.safe,
        attributes=dict(pair.attributes),
        embedding=() if pair.embedding is None else pair.embedding.tolist(),
    )


def upserted_of(result: kb_pb.UpsertResult) -> Upserted:
    """Inverse of `upsert_result`."""
    return Upserted(
        pair_id=result.pair_id, outcome=_OUTCOME_OF[result.outcome], field=result.field, reason=result.reason
    )


def upsert_result(upserted: Upserted) -> kb_pb.UpsertResult:
    """What became of a pair."""
    return kb_pb.UpsertResult(
        pair_id=upserted.pair_id,
        outcome=_OUTCOMES[upserted.outcome],
        field=upserted.field,
        reason=upserted.reason,
    )


def stored_pair_message(
    pair: StoredPair, *, image: bytes = b"", embedding: np.ndarray | None = None
) -> kb_pb.StoredPair:
    """A pair as it is stored."""
    return kb_pb.StoredPair(
        pair_id=pair.pair_id,
        caption=pair.caption,
        entity=pair.entity,
        image=image,
        image_format=pair.image_format,
        image_uri=pair.image_uri,
        image_sha256=pair.image_sha256,
        facets=dict(pair.facets),
        author=pair.author,
        source=pair.source,
        license=pair.license,
        safe=pair.safe,
        attributes=dict(pair.attributes),
        embedding=() if embedding is None else embedding.tolist(),
        version=pair.version,
    )


def _neighbor(neighbor: Neighbor) -> pb.Neighbor:
    pair = neighbor.pair
    return pb.Neighbor(
        pair_id=pair.pair_id,
        caption=pair.caption,
        entity=pair.entity,
        image=neighbor.image,
        image_format=pair.image_format,
        facets=dict(pair.facets),
        author=pair.author,
        source=pair.source,
        license=pair.license,
        score=neighbor.score,
        rank=neighbor.rank,
        legs=[
            pb.LegScore(leg=_METHOD_NUMBERS[leg], score=said.score, rank=said.rank)
            for leg, said in neighbor.legs.items()
        ],
        image_uri=pair.image_uri,
        image_sha256=pair.image_sha256,
        embedding=() if neighbor.embedding is None else neighbor.embedding.tolist(),
        safe=pair.safe,
        version=pair.version,
    )


def _embedding(numbers: Sequence[float]) -> np.ndarray | None:
    return np.asarray(numbers, np.float32) if numbers else None
