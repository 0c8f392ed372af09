"""How a pair is laid down in Qdrant, in process or on a server: payload, names of vectors, filters. No vendor."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.service.errors import DataLoss
from retrieval_svc.pairs import Brief, Change, PairFilter, StoredPair, point_of
from retrieval_svc.words import name_key, tie_of

CLIP_VECTOR, BM25_VECTOR = "clip", "bm25"  # dense with cosine similarity; sparse with the engine's IDF
KEYWORD_FIELDS = ("facet", "license", "source", "name", "content", "safety", "level")
BOOL_FIELDS = ("deleted",)
INTEGER_FIELDS = ("version",)
LINKED_FIELDS = ("facet", "license", "source", "safety")  # that a caller's filter selects large parts of the pairs by
# Qdrant compares integers with the bounds of a range as float64, which at 2e18 stand 256 apart: a bound is asked for this much
# too low (two roundings), and what is too much is dropped by comparing integers.
VERSION_SLACK = 512

NUM_LEVELS = 12  # of thinning: each keeps a quarter of the level before, the pairs with the smallest `tie_of`
_THINNING_BITS = 2
_TIE_BITS = 64
BRIEF_FIELDS = ("pair_id", "content", "version")
_TEXTS = ("caption", "entity", "author", "source", "license", "image_sha256", "image_format", "image_uri")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """A `PairFilter` in words that every Qdrant engine has.

    Attributes:
        must: (field, values): the pair has one of the values in the field, for every entry.
        must_not: (field, values): it has none of them.
        not_points: it is none of these points.
        is_deleted: only tombstones (True), only live points (False), both (None: enough for searches by vector, for
            tombstones have none).
        has_embedding: only points with an embedding.
    """

    must: tuple[tuple[str, tuple[str, ...]], ...] = ()
    must_not: tuple[tuple[str, tuple[str, ...]], ...] = ()
    not_points: tuple[str, ...] = ()
    is_deleted: bool | None = None
    has_embedding: bool = False


def facet_term(name: str, value: str) -> str:
    """One facet as a single keyword."""
    return f"{name}={value}"


def payload_of(pair: StoredPair) -> dict[str, Any]:
    """What is stored of a live pair, beside its vectors."""
    return {
        "pair_id": pair.pair_id,
        **{name: getattr(pair, name) for name in _TEXTS},
        "name": name_key(pair.entity),
        "facets": dict(pair.facets),
        "facet": [facet_term(name, value) for name, value in sorted(pair.facets.items())],
        "safe": pair.safe,
        "safety": _safety(pair.safe),
        "content": pair.content,
        "level": _levels(pair.pair_id),
        "attributes": dict(pair.attributes),
        "version": pair.version,
    }


def tombstone(version: int) -> dict[str, Any]:
    """What stays of a deleted pair."""
    return {"version": version, "deleted": True}


def is_tombstone(payload: Mapping[str, Any] | None) -> bool:
    """Whether the pair of this payload is deleted."""
    return bool(payload and payload.get("deleted"))


def is_point(token: str) -> bool:
    """Whether `token` is a point's id as `point_of` writes it."""
    try:
        return str(uuid.UUID(token)) == token
    except ValueError:
        return False


def pair_of(point: str, payload: Mapping[str, Any] | None) -> StoredPair:
    """The pair of a live point's payload.

    Raises:
        DataLoss: the payload lacks something, or belongs to another point.
    """
    if payload is None or is_tombstone(payload) or "pair_id" not in payload:
        raise DataLoss(f"point {point} holds no pair")
    try:
        pair = StoredPair(
            pair_id=payload["pair_id"],
            facets=dict(payload["facets"]),
            safe=payload["safe"],
            attributes=dict(payload["attributes"]),
            version=payload["version"],
            **{name: payload[name] for name in _TEXTS},
        )
    except KeyError as error:
        raise DataLoss(f"point {point} (pair {payload['pair_id']!r}) lacks {error.args[0]!r}") from None
    if point_of(pair.pair_id) != point:
        raise DataLoss(f"point {point} holds pair {pair.pair_id!r}, which belongs elsewhere")
    return pair


def brief_of(point: str, payload: Mapping[str, Any]) -> Brief:
    """What `BRIEF_FIELDS` of a live point's payload say. Raises DataLoss: one of them is missing."""
    try:
        return Brief(pair_id=payload["pair_id"], content=payload["content"], version=payload["version"])
    except KeyError as error:
        raise DataLoss(f"point {point} lacks {error.args[0]!r}") from None


def change_of(point: str, payload: Mapping[str, Any] | None) -> Change:
    """The newest change of a point, live or deleted. Raises DataLoss like `pair_of`."""
    if payload is not None and is_tombstone(payload):
        return Change(point=point, version=payload["version"], pair=None)
    pair = pair_of(point, payload)
    return Change(point=point, version=pair.version, pair=pair)


def whole_changes(found: Sequence[Change], since: int, limit: int, *, is_last: bool) -> list[Change]:
    """Of an ascending page of changes, those to give: above `since`, about `limit`, no version cut in two.

    Writers on several machines may give one version twice; a reader goes on from the last version it was given, so all
    changes of that version must have been in the same page. Without `is_last` the page's last version may go on
    behind it, and is left for later.
    """
    kept = [change for change in found if change.version > since]
    if not is_last:
        kept = [change for change in kept if change.version < found[-1].version]
    if len(kept) <= limit:
        return kept
    return [change for change in kept if change.version <= kept[limit - 1].version]


def conditions(
    filter: PairFilter,
    *,
    names: frozenset[str] = frozenset(),
    level: int = 0,
    is_deleted: bool | None = None,
    has_embedding: bool = False,
) -> Conditions:
    """`filter`, and that the entity's `name_key` is one of `names`, unless there are none. See `Conditions`.

    With a `level`, only the pairs whose `tie_of` is below 4^-level of the largest.
    """
    must: list[tuple[str, tuple[str, ...]]] = [
        ("facet", tuple(sorted(facet_term(name, value) for value in values)))
        for name, values in sorted(filter.facets.items())
        if values
    ]
    must += [
        (field, tuple(sorted(values)))
        for field, values in (("license", filter.licenses), ("source", filter.sources), ("name", names))
        if values
    ]
    if filter.safe is not None:
        must.append(("safety", (_safety(filter.safe),)))
    if level:
        must.append(("level", (str(level),)))
    excluded = (("content", filter.excluded_contents), ("name", filter.excluded_names))
    return Conditions(
        must=tuple(must),
        must_not=tuple((field, tuple(sorted(values))) for field, values in excluded if values),
        not_points=tuple(sorted(point_of(pair_id) for pair_id in filter.excluded_pair_ids)),
        is_deleted=is_deleted,
        has_embedding=has_embedding,
    )


def unit(embedding: np.ndarray, size: int) -> np.ndarray:
    """`embedding` as float32 [size] of unit length.

    Raises:
        ValueError: it has another size, no direction, or something that is not a finite number.
    """
    vector = np.asarray(embedding, dtype=np.float32)
    if vector.shape != (size,):
        raise ValueError(f"an embedding has shape {vector.shape}; this store holds embeddings of size {size}")
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(length) or length == 0.0:
        raise ValueError(f"an embedding has length {length}; it must be finite and above 0")
    return (vector / length).astype(np.float32)


def _safety(safe: bool) -> str:
    """A keyword, for the engine in process matches no booleans (it takes `True` for the integer 1)."""
    return "safe" if safe else "unsafe"


def _levels(pair_id: str) -> list[str]:
    """The levels of thinning that a pair is on: 1 to the deepest, or none."""
    num_leading_zeros = _TIE_BITS - tie_of(pair_id).bit_length()
    return [str(level) for level in range(1, min(num_leading_zeros // _THINNING_BITS, NUM_LEVELS) + 1)]
