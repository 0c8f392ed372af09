"""A generator that draws nothing: it fails and answers as it is told, over a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc

SEED = 2**63 - 1

Fault = Callable[[grpc.ServicerContext], None]
"""Ends a call with an error."""

PICTURE = pb.Image(picture=0, image=b"picture", image_format=pb.IMAGE_FORMAT_PNG, seed=SEED, record_json='{"seed": 1}')
EVENTS = (
    pb.GenerateResponse(accepted=pb.Accepted(prompt="p", seed=SEED, num_pictures=1, stages=[64], seeds=[SEED])),
    pb.GenerateResponse(neighbors=pb.NeighborsFound(knowledge_base="demo")),
    pb.GenerateResponse(image=PICTURE),
    pb.GenerateResponse(done=pb.Done(record_json='{"seed": 9223372036854775807}')),
)


def fails(code: str, message: str = "canned", *details: Any) -> Fault:
    """An error with these google.rpc details."""
    status = status_pb2.Status(code=grpc.StatusCode[code].value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return lambda context: context.abort_with_status(rpc_status.to_status(status))


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    """Come back after so many seconds."""
    return error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=int(1e9 * seconds)))


def bad_request(field: str, description: str) -> error_details_pb2.BadRequest:
    """A field that is refused."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


class CannedGenerator(pb_grpc.GeneratorServiceServicer):
    """Each call meets the next of `faults` (None: no fault; when there are no more: none), after `num_before` events."""

    def __init__(self, faults: Sequence[Fault | None] = (), *, num_before: int = 0) -> None:
        self.faults = list(faults)
        self.num_before = num_before
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.num_cancelled = 0

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        fault = self._met(request, context)
        if request.prompt == "for ever":
            yield from self._for_ever(context)
        if fault is not None:
            yield from EVENTS[: self.num_before]
            fault(context)
        yield from EVENTS[:-1] if request.prompt == "cut" else EVENTS

    def GenerateImages(
        self, request: pb.GenerateImagesRequest, context: grpc.ServicerContext
    ) -> pb.GenerateImagesResponse:
        fault = self._met(request.request, context)
        if fault is not None:
            fault(context)
        return pb.GenerateImagesResponse(images=[PICTURE], neighbors=EVENTS[1].neighbors, done=EVENTS[3].done)

    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        stage = pb.StageModel(
            stage=64,
            name="unet_64",
            version="3",
            weights_sha256="ab" * 32,
            parameters=1234,
            trained_json='{"examples": 5}',
            default_plan_json='{"steps": 8}',
            endpoints=["a:1", "b:2"],
        )
        return pb.ListModelsResponse(stages=[stage], text_encoder="minilm")

    def _met(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Fault | None:
        self.requests.append(request)
        self.metadata.append({key: value for key, value in context.invocation_metadata()})
        return self.faults.pop(0) if self.faults else None

    def _for_ever(self, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield EVENTS[0]
        while context.is_active():
            yield pb.GenerateResponse(step=pb.StepDone(stage=64, step=1, steps=2))
        self.num_cancelled += 1


@contextmanager
def serving(service: CannedGenerator) -> Iterator[str]:
    """Its address while it runs."""
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        pb_grpc.add_GeneratorServiceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
