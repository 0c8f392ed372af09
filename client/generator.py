"""A typed client of the generator service."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2

from client.errors import Violation, retry_after_s, violations

MAX_EVENT_BYTES = 256 << 20  # the neighbors' files come in one event


class GenerationFailed(Exception):
    """The service refused a request or failed.

    Attributes:
        code: the gRPC status code's name, e.g. `INVALID_ARGUMENT`.
        violations: the fields that an INVALID_ARGUMENT names.
        retry_after_s: when the service asks to be tried again; None where it does not say.
    """

    def __init__(self, code: str, message: str, named: Sequence[Violation], retry_after_s: float | None) -> None:
        super().__init__(message)
        self.code = code
        self.violations = tuple(named)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class StageOverrides:
    """Departures of one stage from its defaults; None keeps the default. See generator.proto.

    Attributes:
        stage: 64, 256 or 1024.
        sampler: `ddpm`, `ddim` or `dpmpp_2m`.
        guidance_strategy: `interleaved`, `weighted` or `joint`.
        thresholding: `none`, `static` or `dynamic`.
    """

    stage: int
    steps: int | None = None
    sampler: str | None = None
    guidance_strategy: str | None = None
    text_weight: float | None = None
    neighbor_weight: float | None = None
    eta: float | None = None
    thresholding: str | None = None
    augmentation: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be drawn; the defaults are the service's. See generator.proto.

    Attributes:
        method: `bm25`, `clip` or `hybrid`; empty leaves it to the service.
        seed: None lets the service draw one.
    """

    prompt: str
    k: int | None = None
    knowledge_base: str = ""
    method: str = ""
    excluded_pair_ids: tuple[str, ...] = ()
    exclude_exact: bool = False
    without_neighbors: bool = False
    num_pictures: int = 1
    seed: int | None = None
    stop_at: int = 1024
    stages: tuple[StageOverrides, ...] = ()
    preview_every: int = 0


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request is understood, and there is room for it; `seed` draws these pictures again."""

    prompt: str
    seed: int
    num_pictures: int
    stages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A pair that shapes the pictures; `image` is its file, in `image_format`."""

    pair_id: str
    caption: str
    entity: str
    image: bytes
    image_format: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class NeighborsFound:
    """The neighbors, best first; `shortfall_reason` where there are fewer than asked; `method` as `bm25`."""

    neighbors: tuple[Neighbor, ...]
    knowledge_base: str
    index_fingerprint: str
    shortfall_reason: str
    method: str


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    stage: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A picture has come one step further; `preview_png` is empty where none was asked for."""

    stage: int
    picture: int
    step: int
    steps: int
    preview_png: bytes


@dataclass(frozen=True, kw_only=True)
class StageFinished:
    """A picture has left a stage; `png` is empty in the last one."""

    stage: int
    picture: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Image:
    """A finished picture."""

    picture: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Done:
    """Everything is drawn; `record` says how and from whose work."""

    record: Mapping[str, Any]


Event = Accepted | NeighborsFound | StageStarted | StepDone | StageFinished | Image | Done


class GeneratorClient:
    """One channel to a generator; safe to use from several threads."""

    def __init__(self, address: str) -> None:
        """`address` is unix:/path or host:port; the channel connects at the first call."""
        self._channel = grpc.insecure_channel(address, options=(("grpc.max_receive_message_length", MAX_EVENT_BYTES),))
        self._stub = pb_grpc.GeneratorServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def generate(self, request: GenerationRequest, *, timeout_s: float) -> Generator[Event, None, None]:
        """Draw, and yield what the service says. Closing the generator cancels the call.

        Args:
            request: what is to be drawn.
            timeout_s: deadline of the whole call.

        Raises:
            ValueError: a name (sampler, strategy, thresholding, method) is none of the contract's, or a number
                does not fit its field.
            GenerationFailed: the service refused or failed.
        """
        stream = self._stub.Generate(_message(request), timeout=timeout_s)
        try:
            for response in stream:
                yield _event(response)
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
            raise GenerationFailed(code, details, violations(error), retry_after_s(error)) from error
        finally:
            stream.cancel()


def _message(request: GenerationRequest) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=request.prompt,
        k=request.k or 0,
        knowledge_base=request.knowledge_base,
        method=_number(retrieval_pb2.Method, "METHOD", request.method),
        excluded_pair_ids=request.excluded_pair_ids,
        exclude_exact=request.exclude_exact,
        without_neighbors=request.without_neighbors,
        num_pictures=request.num_pictures,
        seed=request.seed,
        stop_at=request.stop_at,
        stages=[_overrides(stage) for stage in request.stages],
        preview_every=request.preview_every,
    )


def _overrides(stage: StageOverrides) -> pb.StageOverrides:
    return pb.StageOverrides(
        stage=stage.stage,
        steps=stage.steps,
        sampler=_number(pb.Sampler, "SAMPLER", stage.sampler),
        guidance_strategy=_number(pb.GuidanceStrategy, "GUIDANCE_STRATEGY", stage.guidance_strategy),
        text_weight=stage.text_weight,
        neighbor_weight=stage.neighbor_weight,
        eta=stage.eta,
        thresholding=_number(pb.Thresholding, "THRESHOLDING", stage.thresholding),
        augmentation=stage.augmentation,
    )


def _number(kind: Any, prefix: str, name: str | None) -> Any:
    """The number of an enum's value by the name that people use: ("SAMPLER", "ddim") is SAMPLER_DDIM."""
    full = f"{prefix}_{(name or 'unspecified').upper()}"
    if full not in kind.keys():  # noqa: SIM118 (an enum of protobuf is no mapping)
        known = ", ".join(key.removeprefix(f"{prefix}_").lower() for key in kind.keys() if kind.Value(key))  # noqa: SIM118
        raise ValueError(f"{prefix.lower()}: {name!r} is not one of {known}")
    return kind.Value(full)


def _event(response: pb.GenerateResponse) -> Event:
    kind = response.WhichOneof("event")
    if kind == "accepted":
        said = response.accepted
        return Accepted(prompt=said.prompt, seed=said.seed, num_pictures=said.num_pictures, stages=tuple(said.stages))
    if kind == "neighbors":
        found = response.neighbors
        return NeighborsFound(
            neighbors=tuple(_neighbor(neighbor) for neighbor in found.neighbors),
            knowledge_base=found.knowledge_base,
            index_fingerprint=found.index_fingerprint,
            shortfall_reason=found.shortfall_reason,
            method=retrieval_pb2.Method.Name(found.method).removeprefix("METHOD_").lower(),
        )
    if kind == "stage_started":
        return StageStarted(stage=response.stage_started.stage, steps=response.stage_started.steps)
    if kind == "step":
        step = response.step
        return StepDone(
            stage=step.stage, picture=step.picture, step=step.step, steps=step.steps, preview_png=step.preview_png
        )
    if kind == "stage_finished":
        finished = response.stage_finished
        return StageFinished(stage=finished.stage, picture=finished.picture, png=finished.image)
    if kind == "image":
        return Image(picture=response.image.picture, png=response.image.image)
    if kind == "done":
        return Done(record=json.loads(response.done.record_json))
    raise GenerationFailed("INTERNAL", f"the service is newer than this client: unknown event {kind}", (), None)


def _neighbor(neighbor: retrieval_pb2.Neighbor) -> Neighbor:
    return Neighbor(
        pair_id=neighbor.pair_id,
        caption=neighbor.caption,
        entity=neighbor.entity,
        image=neighbor.image,
        image_format=neighbor.image_format,
        facets=dict(neighbor.facets),
        author=neighbor.author,
        source=neighbor.source,
        license=neighbor.license,
        score=neighbor.score,
        rank=neighbor.rank,
    )
