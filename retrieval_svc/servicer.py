"""RetrievalService over gRPC: Retrieve, and BatchRetrieve for many lookups in one call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import grpc.aio
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from common.service.errors import InvalidArgument, ServiceError
from common.service.redaction import redacted_trace
from common.service.status import code_of, message_of
from retrieval_svc.admission import Admission
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.metrics import LEGS, OTHER, RetrievalMetrics, outcome_of
from retrieval_svc.wire import method_of, query_of, retrieve_response

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
BATCH_WINDOW = 16  # lookups of one batch that are under way at once
MAX_REQUEST_ID_CHARACTERS = 1000

log = logging.getLogger(__name__)


class RetrievalServicer(pb_grpc.RetrievalServiceServicer):
    """Answers from the knowledge bases of `library`; searches run on `searches`, the event loop stays free."""

    def __init__(self, library: Library, *, searches: Admission, metrics: RetrievalMetrics) -> None:
        self._library = library
        self._searches = searches
        self._metrics = metrics

    async def Retrieve(self, request: pb.RetrieveRequest, context: grpc.aio.ServicerContext) -> pb.RetrieveResponse:
        """See retrieval.proto; errors are the domain's, and the call interceptor makes statuses of them."""
        return await self._retrieve(request)

    async def BatchRetrieve(
        self, requests: AsyncIterator[pb.BatchRetrieveRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.BatchRetrieveResponse]:
        """See retrieval.proto. A client that does not read its answers is not read from either."""
        batch = _Batch(room=asyncio.Semaphore(BATCH_WINDOW), answers=asyncio.Queue())
        reading = asyncio.create_task(self._read(requests, batch))
        try:
            while (answer := await batch.answers.get()) is not None:
                yield await answer
                batch.room.release()
            await reading  # raises what ended the requests
        finally:
            reading.cancel()
            while not batch.answers.empty():
                left = batch.answers.get_nowait()
                if left is not None:
                    left.cancel()

    async def _read(self, requests: AsyncIterator[pb.BatchRetrieveRequest], batch: _Batch) -> None:
        try:
            async for request in requests:
                await batch.room.acquire()
                batch.answers.put_nowait(asyncio.create_task(self._one_of_many(request)))
        finally:
            batch.answers.put_nowait(None)

    async def _one_of_many(self, request: pb.BatchRetrieveRequest) -> pb.BatchRetrieveResponse:
        try:
            if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
                raise InvalidArgument("request_id", f"is longer than {MAX_REQUEST_ID_CHARACTERS} characters")
            response = await self._retrieve(request.request, patient=True)
        except Exception as error:
            if not isinstance(error, ServiceError):
                log.error("lookup failed", extra={"trace": redacted_trace(error, request)})
            field = error.violations[0][0] if isinstance(error, InvalidArgument) else ""
            failure = pb.RetrieveError(code=code_of(error).value[0], message=message_of(error), field=field)
            request_id = request.request_id[:MAX_REQUEST_ID_CHARACTERS]
            return pb.BatchRetrieveResponse(request_id=request_id, error=failure)
        return pb.BatchRetrieveResponse(request_id=request.request_id, response=response)

    async def _retrieve(self, request: pb.RetrieveRequest, *, patient: bool = False) -> pb.RetrieveResponse:
        leg, outcome, started = OTHER, "ok", time.perf_counter()
        try:
            leg = LEGS[method_of(request.method)]
            response = await self._searches.run(partial(self._answer, request), patient=patient)
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        else:
            outcome = self._count(response)
            return response
        finally:
            self._metrics.count_lookup(leg, outcome, time.perf_counter() - started)

    def _answer(self, request: pb.RetrieveRequest) -> pb.RetrieveResponse:
        knowledge_base = choose(self._library, request.knowledge_base)
        retrieval = knowledge_base.retrieve(query_of(request))
        self._metrics.count_legs(retrieval)
        return retrieve_response(knowledge_base.name, retrieval)

    def _count(self, response: pb.RetrieveResponse) -> str:
        self._metrics.results.observe(len(response.neighbors))
        if response.failed_legs:
            return "degraded"
        return "shortfall" if response.shortfall_reason else "ok"


NAMED = 8  # knowledge bases that an error names


def choose(library: Library, name: str) -> KnowledgeBase:
    """The knowledge base of this name; the only one, where no name is given.

    Raises:
        NotFound: there is none of this name.
        InvalidArgument: no name is given, and there is not exactly one.
    """
    names = library.names()
    if not name and len(names) != 1:
        listed = ", ".join([*names[:NAMED], "…"] if len(names) > NAMED else names) or "there are none"
        raise InvalidArgument("knowledge_base", f"names none of the {len(names)} that there are: {listed}")
    return library.get(name or names[0])


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Lookups under way, in the order of their requests, and the room for more; None ends them."""

    room: asyncio.Semaphore
    answers: asyncio.Queue[asyncio.Task[pb.BatchRetrieveResponse] | None]
