"""The record of a picture, read again: a caller may have written it, so that nothing in it is believed unchecked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from common.diffusion.plan import Plan
from common.service.errors import InvalidArgument
from common.stages import STAGES

FORMAT = "reimagen-record/2"
FIELD = "record_json"
MAX_RECORD_CHARACTERS = 1 << 20
MAX_NEIGHBORS = 64
METHODS = ("METHOD_UNSPECIFIED", "METHOD_BM25", "METHOD_CLIP", "METHOD_HYBRID")
MAX_PICTURES = 8

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RecordedNeighbor:
    """A pair as a record keeps it: everything but its picture. The fields are those of `Neighbor`."""

    pair_id: str
    caption: str
    entity: str
    image_sha256: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int
    is_reference: bool


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a record says.

    Attributes:
        plans: of each picture; they differ in seed and sample alone. One tuple for each stage, in the order of the stages.
        start_sha256: of the file that the first stage began with; empty: it began with noise.
        retrieval: how the neighbors were asked for, and what retrieval said beside them.
        weights: sha256 by stage.
    """

    prompt: str
    negative_prompt: str
    plans: tuple[tuple[Plan, ...], ...]
    start_sha256: str
    neighbors: tuple[RecordedNeighbor, ...]
    retrieval: Mapping[str, Any]
    weights: Mapping[int, str]
    text_encoder: str

    @property
    def references(self) -> tuple[RecordedNeighbor, ...]:
        return tuple(neighbor for neighbor in self.neighbors if neighbor.is_reference)


def read_record(text: str) -> Recorded:
    """What a record says.

    Raises:
        InvalidArgument: it is no record of ours; names the part.
    """
    if len(text) > MAX_RECORD_CHARACTERS:
        raise _refused(f"{len(text)} characters, at most {MAX_RECORD_CHARACTERS} are read")
    try:
        document = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _refused(f"is not JSON ({error})") from None
    whole = _Part("", document)
    if (found := whole.take("format", str)) != FORMAT:
        raise _refused(f"format: {found[:80]!r} is not {FORMAT!r}")
    plans = _plans(whole)
    neighbors = tuple(_neighbor(part) for part in whole.parts("neighbors", MAX_NEIGHBORS))
    if any(late.is_reference > early.is_reference for early, late in pairwise(neighbors)):
        raise _refused("neighbors: a reference stands behind a retrieved pair")
    return Recorded(
        prompt=whole.text("prompt"),
        negative_prompt=whole.text("negative_prompt"),
        plans=plans,
        start_sha256=whole.text("start_from_sha256"),
        neighbors=neighbors,
        retrieval=_retrieval(whole.part("retrieval")),
        weights=_weights(whole.part("weights"), plans),
        text_encoder=whole.text("text_encoder"),
    )


class _Part:
    """An object inside of the record, with the path that leads there."""

    def __init__(self, path: str, document: Any) -> None:
        if not isinstance(document, dict):
            raise _refused(f"{path or 'the record'}: is no JSON object")
        self._path = path
        self.document = document

    def take(self, name: str, kind: type[T]) -> T:
        value = self.any_of(name, (kind,))
        assert isinstance(value, kind)
        return value

    def any_of(self, name: str, kinds: tuple[type, ...]) -> Any:
        where = self._where(name)
        if name not in self.document:
            raise _refused(f"{where}: is missing")
        value = self.document[name]
        if type(value) not in kinds:  # a boolean is an int to Python, and none here
            raise _refused(f"{where}: {str(value)[:80]!r} is no {kinds[0].__name__}")
        return value

    def text(self, name: str) -> str:
        value = self.take(name, str)
        if not _is_unicode(value):
            raise _refused(f"{self._where(name)}: holds half of a character")
        return value

    def part(self, name: str) -> _Part:
        return _Part(self._where(name), self.take(name, dict))

    def _where(self, name: str) -> str:
        return f"{self._path}.{name}".removeprefix(".")[:120]

    def parts(self, name: str, at_most: int) -> list[_Part]:
        values = self.take(name, list)
        if len(values) > at_most:
            raise _refused(f"{name}: holds {len(values)}; at most {at_most} are read")
        return [_Part(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _plans(whole: _Part) -> tuple[tuple[Plan, ...], ...]:
    by_stage: dict[int, list[Plan]] = {}
    for i, part in enumerate(whole.parts("plans", len(STAGES) * MAX_PICTURES)):
        try:
            plan = Plan.from_json(part.document)
        except (TypeError, ValueError) as error:
            raise _refused(f"plans[{i}]: {error}") from None
        by_stage.setdefault(plan.stage, []).append(plan)
    run = [spec for spec in STAGES if spec.size in by_stage]
    sizes = [spec.size for spec in STAGES]
    if not run or list(by_stage) != [spec.size for spec in run] or not _adjoin(sizes, list(by_stage)):
        raise _refused(f"plans: of {list(by_stage)} are not the plans of stages that follow one another in {sizes}")
    stages = tuple(tuple(plans) for plans in by_stage.values())
    for spec, plans in zip(run, stages, strict=True):
        if any(plan.schedule != spec.schedule for plan in plans):
            raise _refused(f"plans: stage {spec.size} has the schedule {spec.schedule!r}")
        if any(replace(plan, seed=0, sample=0) != replace(plans[0], seed=0, sample=0) for plan in plans):
            raise _refused(f"plans: those of stage {spec.size} differ in more than seed and sample")
    pictures = {tuple((plan.seed, plan.sample) for plan in plans) for plans in stages}
    if len(pictures) > 1:
        raise _refused("plans: the stages' plans are not of the same pictures")
    if any(plan.start_time < 1.0 for plans in stages[1:] for plan in plans):
        raise _refused("plans: only the first stage can begin with a picture")
    return stages


def _adjoin(sizes: list[int], run: list[int]) -> bool:
    first = sizes.index(run[0])
    return sizes[first : first + len(run)] == run


def _neighbor(part: _Part) -> RecordedNeighbor:
    facets = part.part("facets")
    score = float(part.any_of("score", (float, int)))
    if not math.isfinite(score):
        raise _refused("neighbors: a score is not finite")
    if (rank := part.take("rank", int)) not in range(1, MAX_NEIGHBORS + 1):
        raise _refused(f"neighbors: the rank {rank} is not between 1 and {MAX_NEIGHBORS}")
    pair_id, is_reference = part.text("pair_id"), part.take("is_reference", bool)
    if not (pair_id or is_reference):
        raise _refused("neighbors: a retrieved pair has no pair_id")
    return RecordedNeighbor(
        pair_id=pair_id,
        caption=part.text("caption"),
        entity=part.text("entity"),
        image_sha256=part.text("image_sha256"),
        facets={name: facets.text(name) for name in facets.document},
        author=part.text("author"),
        source=part.text("source"),
        license=part.text("license"),
        score=score,
        rank=rank,
        is_reference=is_reference,
    )


def _retrieval(part: _Part) -> dict[str, Any]:
    excluded = part.take("excluded_pair_ids", list)
    if not all(isinstance(pair_id, str) and _is_unicode(pair_id) for pair_id in excluded):
        raise _refused("retrieval.excluded_pair_ids: holds what is no text")
    if (k := part.take("k", int)) not in range(MAX_NEIGHBORS + 1):
        raise _refused(f"retrieval.k: {k} is not between 0 and {MAX_NEIGHBORS}")
    if (method := part.take("method", str)) not in METHODS:
        raise _refused(f"retrieval.method: {method[:80]!r} is not one of {', '.join(METHODS)}")
    names = ("knowledge_base", "index_fingerprint", "shortfall_reason", "degraded_reason")
    return {
        "k": k,
        "method": method,
        "excluded_pair_ids": excluded,
        "exclude_exact": part.take("exclude_exact", bool),
        **{name: part.text(name) for name in names},
    }


def _weights(part: _Part, plans: tuple[tuple[Plan, ...], ...]) -> dict[int, str]:
    return {stage[0].stage: part.text(f"unet_{stage[0].stage}") for stage in plans}


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded: JSON can hold halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _refused(reason: str) -> InvalidArgument:
    return InvalidArgument(FIELD, reason)
