"""An order made of a record: what the record says must not be said again, and what it does not hold must be given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.service.errors import FailedPrecondition, InvalidArgument
from generator_svc.neighbors import Neighbor
from generator_svc.order import SIZES, CheckedOrder, Order, Reference
from generator_svc.order_rules import check_common
from generator_svc.recorded import Recorded, RecordedNeighbor, read_record

SAID_BY_THE_RECORD = (
    "prompt",
    "k",
    "knowledge_base",
    "method",
    "excluded_pair_ids",
    "exclude_exact",
    "without_neighbors",
    "num_pictures",
    "seed",
    "seeds",
    "stop_at",
    "stages",
    "negative_prompt",
)


def check_recorded_order(order: Order) -> CheckedOrder:
    """The order that draws a record's pictures again.

    Raises:
        InvalidArgument: it is no record of ours; it is given beside what it says itself; or the pictures that it was
            drawn with are not given with it, or others are. Names the field.
    """
    said = Order()
    for name in SAID_BY_THE_RECORD:
        if getattr(order, name) != getattr(said, name):
            raise InvalidArgument(name, "is given beside record_json, which says it")
    check_common(order)
    recorded = read_record(order.record_json)
    references = _references(order.references, recorded)
    _check_start(order, recorded)
    whole = replace(
        order,
        prompt=recorded.prompt,
        negative_prompt=recorded.negative_prompt,
        excluded_pair_ids=tuple(recorded.retrieval["excluded_pair_ids"]),
        exclude_exact=recorded.retrieval["exclude_exact"],
        references=references,
    )
    return CheckedOrder(order=whole, k=recorded.retrieval["k"], stages=recorded.plans, recorded=recorded)


def check_weights(recorded: Recorded, weights: Mapping[int, str], text_encoder: str) -> None:
    """See that what is served now is what drew the record.

    Raises:
        FailedPrecondition: it is not (WEIGHTS_DIFFER).
    """
    for size, sha256 in recorded.weights.items():
        if weights.get(size) != sha256:
            raise FailedPrecondition(
                f"record_json: stage {size} was drawn with the weights {sha256[:12]}; {weights.get(size, '')[:12]} are served",
                reason="WEIGHTS_DIFFER",
            )
    if recorded.text_encoder != text_encoder:
        raise FailedPrecondition(
            f"record_json: was drawn with the text encoder {recorded.text_encoder[:80]!r}; {text_encoder!r} is served",
            reason="WEIGHTS_DIFFER",
        )


def same_neighbor(recorded: RecordedNeighbor, stored: Neighbor) -> Neighbor:
    """The neighbor of a record, with the picture that is stored now.

    Raises:
        FailedPrecondition: the pair has another picture or caption now (NEIGHBOR_CHANGED).
    """
    if (stored.image_sha256, stored.caption) != (recorded.image_sha256, recorded.caption):
        raise FailedPrecondition(
            f"record_json: pair {recorded.pair_id!r} is not what it was when the picture was drawn",
            reason="NEIGHBOR_CHANGED",
        )
    return Neighbor(image=stored.image, image_format=stored.image_format, **vars(recorded))


def _references(given: Sequence[Reference], recorded: Recorded) -> tuple[Reference, ...]:
    if len(given) != len(recorded.references):
        raise InvalidArgument(
            "references", f"{len(given)} are given; the record was drawn with {len(recorded.references)}"
        )
    for i, (reference, kept) in enumerate(zip(given, recorded.references, strict=True)):
        _check_picture(f"references[{i}].image", reference.image, kept.image_sha256)
        for name in ("caption", "author", "source", "license"):
            if getattr(reference, name) not in ("", getattr(kept, name)):
                raise InvalidArgument(
                    f"references[{i}].{name}", f"{getattr(reference, name)[:80]!r} is not what the record says"
                )
    return tuple(
        Reference(
            image=reference.image, caption=kept.caption, author=kept.author, source=kept.source, license=kept.license
        )
        for reference, kept in zip(given, recorded.references, strict=True)
    )


def _check_start(order: Order, recorded: Recorded) -> None:
    start, first = order.start_from, recorded.plans[0][0]
    if (start is not None) != bool(recorded.start_sha256):
        needed = "needs the picture that the record began with" if start is None else "the record began with noise"
        raise InvalidArgument("start_from", needed)
    if start is None:
        if first.start_time < 1.0 or first.stage != SIZES[0]:
            raise InvalidArgument("record_json", "begins with a picture, and names none")
        return
    _check_picture("start_from.image", start.image, recorded.start_sha256)
    for name, value in (("stage", first.stage), ("strength", first.start_time)):
        if getattr(start, name) not in (None, value):
            raise InvalidArgument(f"start_from.{name}", f"{getattr(start, name)} is not the record's {value}")


def _check_picture(field: str, image: bytes, sha256: str) -> None:
    found = hashlib.sha256(image).hexdigest()
    if found != sha256:
        raise InvalidArgument(field, f"has the sha256 {found[:12]}…, not {sha256[:12]}… of the record")
