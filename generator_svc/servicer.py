"""GeneratorService over gRPC: a message becomes an order, events become messages."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio
from reimagen.generator.v1 import generator_pb2 as pb
from reimagen.generator.v1 import generator_pb2_grpc as pb_grpc

from common.service.errors import InvalidArgument
from common.service.interceptor import CallLimits
from generator_svc.call import Call
from generator_svc.events import Event
from generator_svc.idempotency import SharedDrawings
from generator_svc.pipeline import Pipeline
from generator_svc.wire import WholeResponse, models_response, order_of, response_of

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["GeneratorService"].full_name


class GeneratorServicer(pb_grpc.GeneratorServiceServicer):
    """Draws what callers ask for. Errors are the domain's: the call interceptor makes statuses of them."""

    def __init__(self, pipeline: Pipeline, drawings: SharedDrawings, limits: CallLimits) -> None:
        """`limits` are those under which the calls are answered: what is left of a deadline is told to the work."""
        self._pipeline = pipeline
        self._drawings = drawings
        self._limits = limits

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """See generator.proto."""
        async with aclosing(self._draw(request, context)) as events:
            async for event in events:
                yield response_of(event)

    async def GenerateImages(
        self, request: pb.GenerateImagesRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateImagesResponse:
        """See generator.proto."""
        whole = WholeResponse()
        try:
            if request.request.preview_every:
                raise InvalidArgument("preview_every", f"{request.request.preview_every}: one answer has no previews")
            async with aclosing(self._draw(request.request, context)) as events:
                async for event in events:
                    whole.take(event)
        except InvalidArgument as error:
            ((field, description),) = error.violations
            raise InvalidArgument(f"request.{field}", description, reason=error.reason) from error
        return whole.message

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """See generator.proto."""
        return models_response(await self._pipeline.models(), self._pipeline.text_encoder)

    def _draw(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> AsyncGenerator[Event, None]:
        call = self._call(context)
        order = order_of(request)
        return self._drawings.draw(
            request.request_id, _digest(request), call, lambda call: self._pipeline.draw(order, call)
        )

    def _call(self, context: grpc.aio.ServicerContext) -> Call:
        is_over = threading.Event()
        # Set however the call ends: by its last event, by the caller going away, by its deadline.
        context.add_done_callback(lambda _: is_over.set())  # pyright: ignore[reportArgumentType] (typeshed's stub)
        remaining_s, began = context.time_remaining(), time.monotonic()
        is_late = remaining_s is not None and remaining_s <= 0
        limit_s = remaining_s if is_late else self._limits.deadline_s(remaining_s)
        return Call(
            is_cancelled=is_over.is_set,
            time_remaining_s=lambda: None if limit_s is None else limit_s - (time.monotonic() - began),
            arrived_s=began,
        )


def _digest(request: pb.GenerateRequest) -> bytes:
    """What is the same for two requests that ask for the same."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
