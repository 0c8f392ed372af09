"""Plain data to messages of the retrieval service, and back."""

from __future__ import annotations

from typing import Any

from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from client.message_fields import fitted, name_of, number_of
from client.retrieval_types import (
    FacetSpec,
    Filter,
    Found,
    KnowledgeBaseInfo,
    LegScore,
    Lookup,
    Neighbor,
    Pair,
    StoredPair,
    UpsertOutcome,
)

_TEXTS = ("pair_id", "caption", "entity", "image", "image_uri", "author", "source", "license", "safe")
_NUMBERED = ("image_format", "image_sha256", "version")


def lookup_message(lookup: Lookup) -> pb.RetrieveRequest:
    """A lookup as the service wants it.

    Raises:
        FieldError: the method is none of the contract's, or a number does not fit its field.
    """
    weights = None
    if lookup.weights is not None:
        text, image, embedding = lookup.weights
        weights = pb.QueryWeights(text=text, image=image, embedding=embedding)
    return fitted(
        pb.RetrieveRequest,
        prompt=lookup.prompt,
        k=lookup.k,
        knowledge_base=lookup.knowledge_base,
        method=number_of(pb.Method, "METHOD", "method", lookup.method),
        excluded_pair_ids=lookup.excluded_pair_ids,
        exclude_exact=lookup.exclude_exact,
        query_image=lookup.image,
        query_embedding=lookup.embedding,
        query_weights=weights,
        filter=filter_message(lookup.filter),
        excluded_entities=lookup.excluded_entities,
        diversity=lookup.diversity,
        near_duplicate_similarity=lookup.near_duplicate_similarity,
        include_embeddings=lookup.include_embeddings,
        omit_images=lookup.omit_images,
    )


def filter_message(wanted: Filter) -> pb.Filter:
    """What pairs must have."""
    return fitted(
        pb.Filter,
        "filter.",
        facets={name: pb.Values(values=values) for name, values in wanted.facets.items()},
        licenses=wanted.licenses,
        sources=wanted.sources,
        safe=wanted.safe,  # None leaves it unset
    )


def found_of(response: pb.RetrieveResponse) -> Found:
    """What a lookup found."""
    return Found(
        neighbors=tuple(_neighbor(neighbor) for neighbor in response.neighbors),
        knowledge_base=response.knowledge_base,
        index_fingerprint=response.index_fingerprint,
        index_generation=response.index_generation,
        method=_method_name(response.method),
        shortfall_reason=response.shortfall_reason,
        failed_legs={_method_name(failed.leg): failed.reason for failed in response.failed_legs},
    )


def info_of(said: kb_pb.KnowledgeBase) -> KnowledgeBaseInfo:
    """What a knowledge base is."""
    return KnowledgeBaseInfo(
        name=said.name,
        facets=tuple(
            FacetSpec(
                name=f.name,
                template=f.template,
                values=tuple(f.values),
                alike={value: tuple(others.values) for value, others in f.alike.items()},
            )
            for f in said.facets
        ),
        scene_phrases=tuple(said.scene_phrases),
        embedding_size=said.embedding_size,
        embedding_model=said.embedding_model,
        created_at=said.created_at,
    )


def facet_message(facet: FacetSpec) -> kb_pb.Facet:
    """A facet of a new knowledge base."""
    alike = {value: pb.Values(values=others) for value, others in facet.alike.items()}
    return fitted(kb_pb.Facet, name=facet.name, template=facet.template, values=facet.values, alike=alike)


def pair_message(pair: Pair) -> kb_pb.NewPair:
    """A pair to store."""
    return fitted(
        kb_pb.NewPair,
        facets=dict(pair.facets),
        attributes=dict(pair.attributes),
        embedding=pair.embedding,
        **{name: getattr(pair, name) for name in _TEXTS},
    )


def outcome_of(said: kb_pb.UpsertResult) -> UpsertOutcome:
    """What became of a pair."""
    outcome = kb_pb.UpsertResult.Outcome.Name(said.outcome).removeprefix("OUTCOME_").lower()
    return UpsertOutcome(pair_id=said.pair_id, outcome=outcome, field=said.field, reason=said.reason)


def stored_of(said: kb_pb.StoredPair) -> StoredPair:
    """A pair as it is stored."""
    return _stored(said, attributes=dict(said.attributes))


def _neighbor(said: pb.Neighbor) -> Neighbor:
    return Neighbor(
        pair=_stored(said, attributes={}),
        score=said.score,
        rank=said.rank,
        legs={_method_name(leg.leg): LegScore(score=leg.score, rank=leg.rank) for leg in said.legs},
    )


def _stored(said: Any, *, attributes: dict[str, str]) -> StoredPair:
    return StoredPair(
        facets=dict(said.facets),
        attributes=attributes,
        embedding=tuple(said.embedding),
        **{name: getattr(said, name) for name in (*_TEXTS, *_NUMBERED)},
    )


def _method_name(number: int) -> str:
    return name_of(pb.Method, "METHOD", number)
