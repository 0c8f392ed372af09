"""GeneratorService over gRPC: a message becomes an order, events become messages; protobuf stays in here."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc.aio
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2

from common.diffusion.guidance import Strategy
from common.diffusion.sampler import Sampler
from common.diffusion.threshold import Thresholding
from common.service.errors import InvalidArgument
from generator_svc.events import (
    Accepted,
    Done,
    Event,
    Image,
    NeighborsFound,
    StageFinished,
    StageStarted,
    StepDone,
)
from generator_svc.neighbors import Neighbor
from generator_svc.order import SIZES, Order, StageOverrides
from generator_svc.pipeline import Call, Pipeline

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GeneratorService"].full_name

_SAMPLERS: Mapping[int, Sampler | None] = {
    pb.SAMPLER_UNSPECIFIED: None,
    pb.SAMPLER_DDPM: "ddpm",
    pb.SAMPLER_DDIM: "ddim",
    pb.SAMPLER_DPMPP_2M: "dpmpp_2m",
}
_STRATEGIES: Mapping[int, Strategy | None] = {
    pb.GUIDANCE_STRATEGY_UNSPECIFIED: None,
    pb.GUIDANCE_STRATEGY_INTERLEAVED: "interleaved",
    pb.GUIDANCE_STRATEGY_WEIGHTED: "weighted",
    pb.GUIDANCE_STRATEGY_JOINT: "joint",
}
_THRESHOLDINGS: Mapping[int, Thresholding | None] = {
    pb.THRESHOLDING_UNSPECIFIED: None,
    pb.THRESHOLDING_NONE: "none",
    pb.THRESHOLDING_STATIC: "static",
    pb.THRESHOLDING_DYNAMIC: "dynamic",
}


class GeneratorServicer(pb_grpc.GeneratorServiceServicer):
    """Draws what callers ask for."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See generator.proto; errors are the domain's, and the call interceptor makes statuses of them."""
        is_over = threading.Event()
        # Set however the call ends: by its last event, by the caller going away, by its deadline.
        context.add_done_callback(lambda _: is_over.set())  # pyright: ignore[reportArgumentType] (typeshed's stub)
        call = Call(is_cancelled=is_over.is_set, time_remaining_s=context.time_remaining)
        async for event in self._pipeline.draw(_order(request), call):
            yield _response(event)


def _order(request: pb.GenerateRequest) -> Order:
    return Order(
        prompt=request.prompt,
        k=request.k or None,
        knowledge_base=request.knowledge_base,
        method=_method(request.method),
        excluded_pair_ids=tuple(request.excluded_pair_ids),
        exclude_exact=request.exclude_exact,
        without_neighbors=request.without_neighbors,
        num_pictures=request.num_pictures or 1,
        seed=request.seed if request.HasField("seed") else None,
        stop_at=request.stop_at or SIZES[-1],
        stages=tuple(_overrides(stage, f"stages[{i}]") for i, stage in enumerate(request.stages)),
        preview_every=request.preview_every,
    )


def _overrides(stage: pb.StageOverrides, field: str) -> StageOverrides:
    def given(name: str) -> Any:
        return getattr(stage, name) if stage.HasField(name) else None

    return StageOverrides(
        stage=stage.stage,
        steps=given("steps"),
        sampler=_choice(_SAMPLERS, stage.sampler, f"{field}.sampler"),
        guidance_strategy=_choice(_STRATEGIES, stage.guidance_strategy, f"{field}.guidance_strategy"),
        text_weight=given("text_weight"),
        neighbor_weight=given("neighbor_weight"),
        eta=given("eta"),
        thresholding=_choice(_THRESHOLDINGS, stage.thresholding, f"{field}.thresholding"),
        augmentation=given("augmentation"),
    )


def _choice(choices: Mapping[int, Any], number: int, field: str) -> Any:
    if number not in choices:
        raise InvalidArgument(field, f"{number} is not one of {', '.join(map(str, choices))}")
    return choices[number]


def _method(number: int) -> str:
    if number not in retrieval_pb2.Method.values():
        raise InvalidArgument("method", f"{number} is no method")
    return retrieval_pb2.Method.Name(retrieval_pb2.Method.ValueType(number)) if number else ""


def _response(event: Event) -> pb.GenerateResponse:
    match event:
        case Accepted():
            accepted = pb.Accepted(
                prompt=event.prompt, seed=event.seed, num_pictures=event.num_pictures, stages=event.stages
            )
            return pb.GenerateResponse(accepted=accepted)
        case NeighborsFound():
            found = event.retrieved
            neighbors = pb.NeighborsFound(
                neighbors=[_neighbor(neighbor) for neighbor in found.neighbors],
                knowledge_base=found.knowledge_base,
                index_fingerprint=found.index_fingerprint,
                shortfall_reason=found.shortfall_reason,
                method=found.method,  # pyright: ignore[reportArgumentType] (a name of the enum)
            )
            return pb.GenerateResponse(neighbors=neighbors)
        case StageStarted():
            return pb.GenerateResponse(stage_started=pb.StageStarted(stage=event.stage, steps=event.steps))
        case StepDone():
            step = pb.StepDone(
                stage=event.stage,
                picture=event.picture,
                step=event.step,
                steps=event.steps,
                preview_png=event.preview_png,
            )
            return pb.GenerateResponse(step=step)
        case StageFinished():
            finished = pb.StageFinished(stage=event.stage, picture=event.picture, image=event.png)
            return pb.GenerateResponse(stage_finished=finished)
        case Image():
            return pb.GenerateResponse(image=pb.Image(picture=event.picture, image=event.png))
        case Done():
            record = json.dumps(dict(event.record), ensure_ascii=False)
            return pb.GenerateResponse(done=pb.Done(record_json=record))


def _neighbor(neighbor: Neighbor) -> retrieval_pb2.Neighbor:
    return retrieval_pb2.Neighbor(
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
