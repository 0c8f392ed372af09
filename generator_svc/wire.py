"""Protobuf to the domain and back, for the servicer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2

from common.diffusion.guidance import Strategy
from common.diffusion.sampler import Sampler
from common.diffusion.threshold import Thresholding
from common.service.errors import InvalidArgument
from common.stages import stage as stage_spec
from generator_svc.events import (
    Accepted,
    Done,
    Event,
    Image,
    NeighborsFound,
    Queued,
    StageFinished,
    StageStarted,
    StepDone,
)
from generator_svc.neighbors import Neighbor, Retrieved
from generator_svc.order import Order, PriorityName, Reference, StageOverrides, StartFrom
from generator_svc.picture_files import ImageFormat
from generator_svc.stage_backend import StageInfo

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
_FORMATS: Mapping[int, ImageFormat] = {
    pb.IMAGE_FORMAT_UNSPECIFIED: "png",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_WEBP: "webp",
}
_FORMAT_NUMBERS = {"png": pb.IMAGE_FORMAT_PNG, "webp": pb.IMAGE_FORMAT_WEBP}
_PRIORITIES: Mapping[int, PriorityName] = {
    pb.PRIORITY_UNSPECIFIED: "normal",
    pb.PRIORITY_LOW: "low",
    pb.PRIORITY_NORMAL: "normal",
    pb.PRIORITY_HIGH: "high",
}


def order_of(request: pb.GenerateRequest) -> Order:
    """What is asked.

    Raises:
        InvalidArgument: a number is none of its enum's.
    """
    return Order(
        prompt=request.prompt,
        k=request.k or None,
        knowledge_base=request.knowledge_base,
        method=_method(request.method),
        excluded_pair_ids=tuple(request.excluded_pair_ids),
        exclude_exact=request.exclude_exact,
        without_neighbors=request.without_neighbors,
        num_pictures=request.num_pictures or None,
        seed=request.seed if request.HasField("seed") else None,
        stop_at=request.stop_at or None,
        stages=tuple(_overrides(stage, f"stages[{i}]") for i, stage in enumerate(request.stages)),
        preview_every=request.preview_every,
        negative_prompt=request.negative_prompt,
        references=tuple(_reference(reference) for reference in request.references),
        seeds=tuple(request.seeds),
        start_from=_start_from(request.start_from) if request.HasField("start_from") else None,
        image_format=_choice(_FORMATS, request.image_format, "image_format"),
        every_stage=request.every_stage,
        priority=_choice(_PRIORITIES, request.priority, "priority"),
        request_id=request.request_id,
        record_json=request.record_json,
    )


def response_of(event: Event) -> pb.GenerateResponse:
    """What happens, as a message of the stream."""
    match event:
        case Accepted():
            return pb.GenerateResponse(accepted=_accepted(event))
        case Queued():
            return pb.GenerateResponse(queued=pb.Queued(queue_position=event.queue_position))
        case NeighborsFound():
            return pb.GenerateResponse(neighbors=_found(event.retrieved))
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
            return pb.GenerateResponse(stage_finished=_finished(event))
        case Image():
            return pb.GenerateResponse(image=_image(event))
        case Done():
            return pb.GenerateResponse(done=_done(event))


class WholeResponse:
    """The one answer of GenerateImages, made of the events of a drawing."""

    def __init__(self) -> None:
        self.message = pb.GenerateImagesResponse()

    def take(self, event: Event) -> None:
        """Take an event in."""
        match event:
            case NeighborsFound():
                self.message.neighbors.CopyFrom(_found(event.retrieved))
            case StageFinished() if event.image:
                self.message.stages.append(_finished(event))
            case Image():
                self.message.images.append(_image(event))
            case Done():
                self.message.done.CopyFrom(_done(event))


def models_response(infos: Iterable[StageInfo], text_encoder: str) -> pb.ListModelsResponse:
    """What is drawn with."""
    return pb.ListModelsResponse(stages=[_model(info) for info in infos], text_encoder=text_encoder)


def _model(info: StageInfo) -> pb.StageModel:
    spec = stage_spec(info.stage)
    plan = spec.plan(seed=0).to_json()
    for name in ("seed", "sample"):  # these are the request's
        del plan[name]
    return pb.StageModel(
        stage=info.stage,
        name=spec.name,
        version=info.version,
        weights_sha256=info.weights_sha256,
        parameters=info.parameters,
        trained_json=_json(dict(info.trained)),
        default_plan_json=_json(plan),
        endpoints=info.endpoints,
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


def _reference(reference: pb.Reference) -> Reference:
    return Reference(
        image=reference.image,
        caption=reference.caption,
        author=reference.author,
        source=reference.source,
        license=reference.license,
    )


def _start_from(start: pb.StartFrom) -> StartFrom:
    return StartFrom(
        image=start.image,
        stage=start.stage or None,
        strength=start.strength if start.HasField("strength") else None,
    )


def _choice(choices: Mapping[int, Any], number: int, field: str) -> Any:
    if number not in choices:
        raise InvalidArgument(field, f"{number} is not one of {', '.join(map(str, choices))}")
    return choices[number]


def _method(number: int) -> str:
    if number not in retrieval_pb2.Method.values():
        raise InvalidArgument("method", f"{number} is no method")
    return retrieval_pb2.Method.Name(retrieval_pb2.Method.ValueType(number)) if number else ""


def _accepted(event: Accepted) -> pb.Accepted:
    return pb.Accepted(
        prompt=event.prompt,
        seed=event.seeds[0],
        num_pictures=len(event.seeds),
        stages=event.stages,
        seeds=event.seeds,
        queue_position=event.queue_position,
    )


def _found(found: Retrieved) -> pb.NeighborsFound:
    return pb.NeighborsFound(
        neighbors=[_neighbor(neighbor) for neighbor in found.neighbors],
        knowledge_base=found.knowledge_base,
        index_fingerprint=found.index_fingerprint,
        shortfall_reason=found.shortfall_reason,
        method=found.method,  # pyright: ignore[reportArgumentType] (a name of the enum)
        num_references=found.num_references,
        degraded_reason=found.degraded_reason,
    )


def _finished(event: StageFinished) -> pb.StageFinished:
    return pb.StageFinished(stage=event.stage, picture=event.picture, image=event.image)


def _image(event: Image) -> pb.Image:
    return pb.Image(
        picture=event.picture,
        image=event.image,
        image_format=_FORMAT_NUMBERS[event.image_format],
        seed=event.seed,
        record_json=event.record_json,
    )


def _done(event: Done) -> pb.Done:
    return pb.Done(record_json=_json(dict(event.record)))


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False)


def _neighbor(neighbor: Neighbor) -> retrieval_pb2.Neighbor:
    return retrieval_pb2.Neighbor(
        pair_id=neighbor.pair_id,
        caption=neighbor.caption,
        entity=neighbor.entity,
        image=neighbor.image,
        image_format=neighbor.image_format,
        image_sha256=neighbor.image_sha256,
        facets=dict(neighbor.facets),
        author=neighbor.author,
        source=neighbor.source,
        license=neighbor.license,
        score=neighbor.score,
        rank=neighbor.rank,
    )
