"""What a served stage takes and gives, as named arrays: the contract of `model_repository/` and of whoever calls it.

A request is one order's stage: P plans that share one condition. It is answered by a stream of responses: one for each
round in which pictures of the order took a step, the last one with the finished pictures; one that says nothing is a
sign of life, twice a second where a step takes longer, for as long as it may take (PATIENCE_S, PATIENCE_PASSES).
Every array travels with a leading dimension of 1, since a request is one row of Triton's batch; texts and plans travel
as JSON in UINT8, because the Python backend of 2.51 ends its process over BYTES under NumPy 2.

    plans            UINT8 [N]           JSON array of `Plan.to_json`; an empty one asks for `model` alone,
                                         and ends the live request of the same request id
    preview_every    INT32 [1]           a preview after each so many steps of a picture; 0: none
    <field>          see INPUT_KINDS     each field of `StageInputs`; one that is None is left out

    steps            INT32 [P]           steps that each picture has done
    preview_of       INT32 [M]           the pictures that have a preview
    previews         UINT8 [M, S, S, 3]  their estimated pictures
    pictures         FP32 [P, 3, S, S]   in [-1, 1]; in the last response alone
    model            UINT8 [N]           JSON of `ModelCard`; in the last response alone

An error ends the stream; its text is `pack_error`'s. A request's `timeout` parameter (microseconds) is its deadline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from common.diffusion.plan import Plan
from common.images import from_unit, to_unit
from common.service.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from common.unet.config import UNetConfig
from generator_svc.stage_inputs import EncodedTexts, StageInputs

Tensors = dict[str, np.ndarray]
"""Arrays by name, each with a leading dimension of 1."""

NUMPY_TYPES: dict[str, np.dtype] = {
    "FP32": np.dtype(np.float32),
    "INT32": np.dtype(np.int32),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class TensorKind:
    """A tensor's type in Triton's words, and its dimensions without the batch's (-1: any)."""

    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


INPUT_KINDS: dict[str, TensorKind] = {
    "text": TensorKind(data_type="FP32", dims=(-1, -1)),
    "text_mask": TensorKind(data_type="BOOL", dims=(-1,)),
    "neighbors": TensorKind(data_type="UINT8", dims=(-1, -1, -1, 3)),
    "neighbor_text": TensorKind(data_type="FP32", dims=(-1, -1, -1)),
    "neighbor_text_mask": TensorKind(data_type="BOOL", dims=(-1, -1)),
    "low_res": TensorKind(data_type="FP32", dims=(-1, 3, -1, -1), optional=True),
    "negative_text": TensorKind(data_type="FP32", dims=(-1, -1), optional=True),
    "negative_text_mask": TensorKind(data_type="BOOL", dims=(-1,), optional=True),
    "start": TensorKind(data_type="FP32", dims=(-1, 3, -1, -1), optional=True),
}
"""One row for each field of `StageInputs`."""

UNET_INPUTS: dict[str, TensorKind] = {
    "plans": TensorKind(data_type="UINT8", dims=(-1,)),
    "preview_every": TensorKind(data_type="INT32", dims=(1,), optional=True),
    # Optional for Triton, since a question for `model` carries none of them; `unpack_request` asks for what it needs.
    **{name: TensorKind(data_type=k.data_type, dims=k.dims, optional=True) for name, k in INPUT_KINDS.items()},
}
UNET_OUTPUTS: dict[str, TensorKind] = {
    "steps": TensorKind(data_type="INT32", dims=(-1,)),
    "preview_of": TensorKind(data_type="INT32", dims=(-1,)),
    "previews": TensorKind(data_type="UINT8", dims=(-1, -1, -1, 3)),
    "pictures": TensorKind(data_type="FP32", dims=(-1, 3, -1, -1)),
    "model": TensorKind(data_type="UINT8", dims=(-1,)),
}
PATIENCE_S, PATIENCE_PASSES = 10.0, 10
"""What a step may take before its model is taken for hung: so long, or so many full and undisturbed passes."""
TEXT_ENCODER = "text_encoder"
MAX_TEXTS_BYTES = 1 << 20
TEXT_INPUTS: dict[str, TensorKind] = {"texts": TensorKind(data_type="UINT8", dims=(-1,))}
"""JSON array of T strings."""
TEXT_OUTPUTS: dict[str, TensorKind] = {
    "states": TensorKind(data_type="FP32", dims=(-1, -1, -1)),
    "mask": TensorKind(data_type="BOOL", dims=(-1, -1)),
}
"""Token states [T, L, D] and mask [T, L], L the longest of these texts."""


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """One order's stage: P plans under one condition. `inputs` is None where only `model` is asked for (P = 0)."""

    plans: tuple[Plan, ...]
    inputs: StageInputs | None
    preview_every: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a served stage is.

    Attributes:
        stage: side of its pictures.
        unet: its architecture: what its inputs must be.
        sha256: of its weights.
        version: of the model in the repository.
        parameters: how many numbers the weights hold.
        trained: what the weights say of their training.
        max_live_bytes: bound on what its requests may keep.
        element_bytes: of a number of the network, see `live_bytes`.
        pass_s: seconds that a full batch's pass takes, where nothing disturbs it.
    """

    stage: int
    unet: UNetConfig
    sha256: str
    version: str
    parameters: int
    trained: Mapping[str, Any]
    max_live_bytes: int
    element_bytes: int
    pass_s: float


@dataclass(frozen=True, kw_only=True)
class StageResponse:
    """What a response says.

    Attributes:
        steps: steps that each picture has done [P].
        previews: by picture, the estimate after its last step, float32 in [-1, 1] [3, S, S].
        pictures: float32 in [-1, 1] [P, 3, S, S]; None but in the last response.
        model: None but in the last response.
    """

    steps: tuple[int, ...] = ()
    previews: Mapping[int, np.ndarray] = field(default_factory=dict)
    pictures: np.ndarray | None = None
    model: ModelCard | None = None


def pack_request(request: StageRequest) -> Tensors:
    """The arrays of a request."""
    tensors = {"plans": _packed_json([plan.to_json() for plan in request.plans])}
    if request.inputs is not None:
        tensors["preview_every"] = np.array([[request.preview_every]], np.int32)
        for name, value in _named(request.inputs).items():
            if value is not None:
                tensors[name] = np.ascontiguousarray(value, NUMPY_TYPES[INPUT_KINDS[name].data_type])[None]
    return tensors


def unpack_request(tensors: Mapping[str, np.ndarray]) -> StageRequest:
    """Inverse of `pack_request`.

    Raises:
        InvalidArgument: a tensor is missing, or is not what its name promises.
    """
    plans = tuple(_plan(i, document) for i, document in enumerate(_unpacked_json("plans", tensors, list)))
    if not plans:
        return StageRequest(plans=(), inputs=None)
    preview_every = int(_row("preview_every", tensors)[0]) if "preview_every" in tensors else 0
    if preview_every < 0:
        raise InvalidArgument("preview_every", f"{preview_every} is negative")
    given: dict[str, Any] = {}
    for each in fields(StageInputs):
        if each.name in tensors:
            given[each.name] = _row(each.name, tensors)
        elif not INPUT_KINDS[each.name].optional:
            raise InvalidArgument(each.name, "is missing")
        else:
            given[each.name] = None
    return StageRequest(plans=plans, inputs=StageInputs(**given), preview_every=preview_every)


def pack_response(response: StageResponse) -> Tensors:
    """The arrays of a response; what it does not say is left out."""
    tensors: Tensors = {}
    if response.steps:
        tensors["steps"] = np.array([response.steps], np.int32)
    if response.previews:
        tensors["preview_of"] = np.array([list(response.previews)], np.int32)
        seen = np.stack([np.moveaxis(x0, 0, -1) for x0 in response.previews.values()])
        tensors["previews"] = np.ascontiguousarray(from_unit(seen))[None]
    if response.pictures is not None:
        tensors["pictures"] = np.ascontiguousarray(response.pictures, np.float32)[None]
    if response.model is not None:
        tensors["model"] = _packed_json(asdict(response.model))
    return tensors


def unpack_response(tensors: Mapping[str, np.ndarray]) -> StageResponse:
    """Inverse of `pack_response`, previews but for their rounding to 8 bits."""
    previews: dict[int, np.ndarray] = {}
    if "previews" in tensors:
        seen = np.moveaxis(to_unit(tensors["previews"][0]), -1, 1)
        previews = {int(picture): seen[i] for i, picture in enumerate(tensors["preview_of"][0])}
    model = None
    if "model" in tensors:
        document = _unpacked_json("model", tensors, dict)
        model = ModelCard(**(document | {"unet": UNetConfig.from_json(document["unet"])}))
    return StageResponse(
        steps=tuple(int(step) for step in tensors["steps"][0]) if "steps" in tensors else (),
        previews=previews,
        pictures=tensors["pictures"][0] if "pictures" in tensors else None,
        model=model,
    )


def pack_texts(texts: Sequence[str]) -> Tensors:
    """The arrays of a request to the text encoder."""
    return {"texts": _packed_json(list(texts))}


def unpack_texts(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Inverse of `pack_texts`.

    Raises:
        InvalidArgument: it is no array of strings, or an empty one.
    """
    if "texts" in tensors and tensors["texts"].nbytes > MAX_TEXTS_BYTES:
        raise InvalidArgument("texts", f"{tensors['texts'].nbytes} bytes are more than {MAX_TEXTS_BYTES}")
    texts = _unpacked_json("texts", tensors, list)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument("texts", "is not a JSON array of at least one string")
    return texts


def pack_encoded(encoded: EncodedTexts) -> Tensors:
    """The arrays of the text encoder's answer."""
    return {
        "states": np.ascontiguousarray(encoded.states, np.float32)[None],
        "mask": np.ascontiguousarray(encoded.mask, np.bool_)[None],
    }


def unpack_encoded(tensors: Mapping[str, np.ndarray]) -> EncodedTexts:
    """Inverse of `pack_encoded`."""
    return EncodedTexts(states=tensors["states"][0], mask=tensors["mask"][0])


_ERRORS: dict[str, type[ServiceError]] = {
    kind.__name__: kind
    for kind in (DataLoss, DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable)
}
_ERROR = re.compile(
    r"(?P<kind>\w+)\[(?P<reason>[A-Z0-9_]+)(?: retry_after_s=(?P<retry>[\d.]+))?\] (?P<said>.*)", re.DOTALL
)


def pack_error(error: ServiceError) -> str:
    """`Kind[REASON retry_after_s=S] description`: the only part of an error that a stream carries is its text."""
    retry = getattr(error, "retry_after_s", None)
    return f"{type(error).__name__}[{error.reason}{'' if retry is None else f' retry_after_s={retry:g}'}] {error.description}"


def unpack_error(text: str) -> ServiceError | None:
    """Inverse of `pack_error`; None where the text is another's, e.g. Triton's own."""
    found = _ERROR.search(text)
    kind = _ERRORS.get(found["kind"]) if found else None
    if found is None or kind is None:
        return None
    reason, said = found["reason"], found["said"]
    if kind is InvalidArgument:
        name, _, why = said.partition(": ")
        return InvalidArgument(name, why, reason=reason)
    if kind in (ResourceExhausted, Unavailable):
        return kind(said, reason=reason, retry_after_s=float(found["retry"]) if found["retry"] else None)  # type: ignore[call-arg]
    return kind(said, reason=reason)


def _named(inputs: StageInputs) -> dict[str, np.ndarray | None]:
    return {each.name: getattr(inputs, each.name) for each in fields(inputs)}


def _row(name: str, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The one row of a tensor, which must be of its kind."""
    array, kind = tensors[name], UNET_INPUTS[name]
    fits = array.ndim == 1 + len(kind.dims) and array.shape[0] == 1
    fits = fits and all(want in (-1, have) for want, have in zip(kind.dims, array.shape[1:], strict=True))
    if not fits or array.dtype != NUMPY_TYPES[kind.data_type]:
        wanted = [1, *kind.dims]
        raise InvalidArgument(name, f"{array.dtype} {list(array.shape)} is not {kind.data_type} {wanted}")
    return array[0]


def _packed_json(document: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(document).encode(), np.uint8)[None]


def _unpacked_json(name: str, tensors: Mapping[str, np.ndarray], kind: type) -> Any:
    if name not in tensors:
        raise InvalidArgument(name, "is missing")
    try:
        document = json.loads(tensors[name].tobytes())
    except ValueError as error:
        raise InvalidArgument(name, f"is not JSON ({error})") from None
    if not isinstance(document, kind):
        raise InvalidArgument(name, f"is a JSON {type(document).__name__}, not a {kind.__name__}")
    return document


def _plan(index: int, document: Any) -> Plan:
    try:
        return Plan.from_json(document)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"plans[{index}]", str(error)) from None
