"""Plain data to calls and messages of the generator service, and back."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2

from client.call import Call
from client.errors import ServiceFailed
from client.generation_types import (
    Accepted,
    Done,
    Event,
    Generation,
    GenerationRequest,
    Image,
    Models,
    Neighbor,
    NeighborsFound,
    Queued,
    Reference,
    StageFinished,
    StageModel,
    StageOverrides,
    StageStarted,
    StartFrom,
    StepDone,
)
from client.message_fields import fitted, name_of, names_of, number_of

SAMPLERS = names_of(pb.Sampler, "SAMPLER")
STRATEGIES = names_of(pb.GuidanceStrategy, "GUIDANCE_STRATEGY")
THRESHOLDINGS = names_of(pb.Thresholding, "THRESHOLDING")
IMAGE_FORMATS = names_of(pb.ImageFormat, "IMAGE_FORMAT")
PRIORITIES = names_of(pb.Priority, "PRIORITY")
METHODS = names_of(retrieval_pb2.Method, "METHOD")


class GenerationFailed(ServiceFailed):
    """The generator refused a request or failed."""

    def __str__(self) -> str:
        return self.description


def events_call(request: GenerationRequest) -> Call[Event]:
    """Draws, and says on the way what happens.

    Raises:
        FieldError: see `request_message`.
    """
    message = request_message(_identified(request))
    return Call(stub=pb_grpc.GeneratorServiceStub, method="Generate", request=message, read=event_of)


def images_call(request: GenerationRequest) -> Call[Generation]:
    """Draws, in one answer.

    Raises:
        FieldError: see `request_message`.
    """
    message = pb.GenerateImagesRequest(request=request_message(_identified(request)))
    return Call(stub=pb_grpc.GeneratorServiceStub, method="GenerateImages", request=message, read=generation_of)


def models_call() -> Call[Models]:
    """Asks what the service draws with."""
    return Call(stub=pb_grpc.GeneratorServiceStub, method="ListModels", request=pb.ListModelsRequest(), read=models_of)


def _identified(request: GenerationRequest) -> GenerationRequest:
    """With an id, so that an attempt that is made again joins the first one."""
    return request if request.request_id else replace(request, request_id=str(uuid.uuid4()))


def request_message(request: GenerationRequest) -> pb.GenerateRequest:
    """A request as the service wants it.

    Raises:
        FieldError: a name (sampler, strategy, thresholding, method, format, priority) is none of the contract's, or a
            number does not fit its field.
    """
    return fitted(
        pb.GenerateRequest,
        "",
        prompt=request.prompt,
        k=request.k or 0,
        knowledge_base=request.knowledge_base,
        method=number_of(retrieval_pb2.Method, "METHOD", "method", request.method),
        excluded_pair_ids=request.excluded_pair_ids,
        exclude_exact=request.exclude_exact,
        without_neighbors=request.without_neighbors,
        num_pictures=request.num_pictures or 0,
        seed=request.seed,
        stop_at=request.stop_at or 0,
        stages=[_overrides(stage, f"stages[{i}].") for i, stage in enumerate(request.stages)],
        preview_every=request.preview_every,
        negative_prompt=request.negative_prompt,
        references=[_reference(reference, f"references[{i}].") for i, reference in enumerate(request.references)],
        seeds=request.seeds,
        start_from=_start_from(request.start_from),
        image_format=number_of(pb.ImageFormat, "IMAGE_FORMAT", "image_format", request.image_format),
        every_stage=request.every_stage,
        priority=number_of(pb.Priority, "PRIORITY", "priority", request.priority),
        request_id=request.request_id,
        record_json=request.record_json,
    )


def event_of(response: pb.GenerateResponse) -> Event:
    """What the service says.

    Raises:
        GenerationFailed: it says something that is newer than this client.
    """
    kind = response.WhichOneof("event")
    if kind is None:
        raise _too_new("unknown event None")
    said = getattr(response, kind)
    match kind:
        case "accepted":
            return _accepted(said)
        case "queued":
            return Queued(queue_position=said.queue_position)
        case "neighbors":
            return _found(said)
        case "stage_started":
            return StageStarted(stage=said.stage, steps=said.steps)
        case "step":
            return StepDone(
                stage=said.stage, picture=said.picture, step=said.step, steps=said.steps, preview_png=said.preview_png
            )
        case "stage_finished":
            return _finished(said)
        case "image":
            return _image(said)
        case "done":
            return Done(record=json.loads(said.record_json))
    raise _too_new(f"unknown event {kind}")


def generation_of(response: pb.GenerateImagesResponse) -> Generation:
    """What was drawn in one answer."""
    return Generation(
        images=tuple(_image(image) for image in response.images),
        stages=tuple(_finished(stage) for stage in response.stages),
        neighbors=_found(response.neighbors),
        record=json.loads(response.done.record_json),
    )


def models_of(response: pb.ListModelsResponse) -> Models:
    """What the service draws with."""
    return Models(stages=tuple(_model(stage) for stage in response.stages), text_encoder=response.text_encoder)


def _too_new(what: str) -> GenerationFailed:
    return GenerationFailed("INTERNAL", f"the service is newer than this client: {what}")


def _overrides(stage: StageOverrides, place: str) -> pb.StageOverrides:
    strategy = number_of(pb.GuidanceStrategy, "GUIDANCE_STRATEGY", f"{place}guidance_strategy", stage.guidance_strategy)
    return fitted(
        pb.StageOverrides,
        place,
        stage=stage.stage,
        steps=stage.steps,
        sampler=number_of(pb.Sampler, "SAMPLER", f"{place}sampler", stage.sampler),
        guidance_strategy=strategy,
        text_weight=stage.text_weight,
        neighbor_weight=stage.neighbor_weight,
        eta=stage.eta,
        thresholding=number_of(pb.Thresholding, "THRESHOLDING", f"{place}thresholding", stage.thresholding),
        augmentation=stage.augmentation,
    )


def _reference(reference: Reference, place: str) -> pb.Reference:
    return fitted(
        pb.Reference,
        place,
        image=reference.image,
        caption=reference.caption,
        author=reference.author,
        source=reference.source,
        license=reference.license,
    )


def _start_from(start: StartFrom | None) -> pb.StartFrom | None:
    if start is None:
        return None
    return fitted(pb.StartFrom, "start_from.", image=start.image, stage=start.stage or 0, strength=start.strength)


def _accepted(said: pb.Accepted) -> Accepted:
    return Accepted(
        prompt=said.prompt,
        seed=said.seed,
        num_pictures=said.num_pictures,
        stages=tuple(said.stages),
        seeds=tuple(said.seeds),
        queue_position=said.queue_position,
    )


def _found(said: pb.NeighborsFound) -> NeighborsFound:
    return NeighborsFound(
        neighbors=tuple(_neighbor(neighbor) for neighbor in said.neighbors),
        knowledge_base=said.knowledge_base,
        index_fingerprint=said.index_fingerprint,
        shortfall_reason=said.shortfall_reason,
        method=name_of(retrieval_pb2.Method, "METHOD", said.method),
        num_references=said.num_references,
        degraded_reason=said.degraded_reason,
    )


def _neighbor(said: retrieval_pb2.Neighbor) -> Neighbor:
    return Neighbor(
        pair_id=said.pair_id,
        caption=said.caption,
        entity=said.entity,
        image=said.image,
        image_format=said.image_format,
        facets=dict(said.facets),
        author=said.author,
        source=said.source,
        license=said.license,
        score=said.score,
        rank=said.rank,
    )


def _finished(said: pb.StageFinished) -> StageFinished:
    return StageFinished(stage=said.stage, picture=said.picture, image=said.image)


def _image(said: pb.Image) -> Image:
    return Image(
        picture=said.picture,
        image=said.image,
        image_format=name_of(pb.ImageFormat, "IMAGE_FORMAT", said.image_format or pb.IMAGE_FORMAT_PNG),
        seed=said.seed,
        record_json=said.record_json,
    )


def _model(said: pb.StageModel) -> StageModel:
    return StageModel(
        stage=said.stage,
        name=said.name,
        version=said.version,
        weights_sha256=said.weights_sha256,
        parameters=said.parameters,
        trained=json.loads(said.trained_json or "{}"),
        default_plan=json.loads(said.default_plan_json or "{}"),
        endpoints=tuple(said.endpoints),
    )
