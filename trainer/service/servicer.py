"""TrainerService over gRPC: messages become what runs are asked, and records become messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc.aio
from reimagen.trainer.v1 import trainer_pb2 as pb
from reimagen.trainer.v1 import trainer_pb2_grpc as pb_grpc

from common.service.errors import FailedPrecondition, InvalidArgument, NotFound
from trainer.service.exports import Exports, ExportState
from trainer.service.run_log import Figures, SampleGrid
from trainer.service.run_record import RunRecord
from trainer.service.run_watch import RunWatch
from trainer.service.runs import Runs
from trainer.service.wire import export_message, figures_message, grid_message, run_message, spec_of, states_of

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["TrainerService"].full_name
ADMIN_METHODS = frozenset(f"/{SERVICE_NAME}/{method}" for method in ("StartRun", "CancelRun", "DeleteRun", "ExportRun"))
DEFAULT_PAGE, MAX_PAGE = 100, 1000
MAX_PAGE_BYTES = 2 << 20  # gRPC clients take 4 MiB by default


class TrainerServicer(pb_grpc.TrainerServiceServicer):
    """See trainer.proto; errors are the domain's: the call interceptor makes statuses of them."""

    def __init__(self, runs: Runs, exports: Exports, watch: RunWatch) -> None:
        self._runs = runs
        self._exports = exports
        self._watch = watch

    async def StartRun(self, request: pb.StartRunRequest, context: grpc.aio.ServicerContext) -> pb.StartRunResponse:
        spec = spec_of(request.spec)
        record = await asyncio.to_thread(self._runs.start, request.run, spec, request.request_id)
        return pb.StartRunResponse(run=await self._message(record))

    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=await self._message(self._runs.get(request.run)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext) -> pb.ListRunsResponse:
        if request.page_size > MAX_PAGE:
            raise InvalidArgument("page_size", f"{request.page_size} is more than {MAX_PAGE}")
        records, token = self._runs.list(
            after=request.page_token, limit=request.page_size or DEFAULT_PAGE, states=states_of(request.states)
        )
        page = pb.ListRunsResponse(next_page_token=token)
        size = 0
        for record in records:
            message = await self._message(record)
            size += message.ByteSize()
            if page.runs and size > MAX_PAGE_BYTES:
                page.next_page_token = page.runs[-1].name
                break
            page.runs.append(message)
        return page

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.WatchRunResponse]:
        following = self._watch.follow(request.run, from_step=request.from_step, samples=not request.omit_samples)
        async with aclosing(following) as events:
            async for event in events:
                match event:
                    case RunRecord():
                        yield pb.WatchRunResponse(run=await self._message(event))
                    case Figures():
                        yield figures_message(event)
                    case SampleGrid():
                        yield grid_message(event)

    async def CancelRun(self, request: pb.CancelRunRequest, context: grpc.aio.ServicerContext) -> pb.CancelRunResponse:
        record = await asyncio.to_thread(self._runs.cancel, request.run)
        return pb.CancelRunResponse(run=await self._message(record))

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: grpc.aio.ServicerContext) -> pb.DeleteRunResponse:
        try:
            await asyncio.to_thread(self._runs.delete, request.run, letting_go=self._exports.letting_go)
        except NotFound:
            if not request.allow_missing:
                raise
        return pb.DeleteRunResponse()

    async def ExportRun(
        self, request: pb.ExportRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ExportRunResponse]:
        run = self._runs.get(request.run)
        record = told = await asyncio.to_thread(
            self._exports.start, run, request.weights, request.request_id, replace=request.replace
        )
        yield pb.ExportRunResponse(export=export_message(record))
        while not record.state.is_over:
            await self._watch.pause()
            found = self._exports.find(request.run, record.token)
            if found is None:  # ended, and another has begun, or the run was deleted
                return
            record = found
            if record != told:
                told = record
                yield pb.ExportRunResponse(export=export_message(record))
        if record.state == ExportState.FAILED:
            raise FailedPrecondition(f"export of run {request.run!r}: {_why(record.error)}", reason="EXPORT_FAILED")

    async def _message(self, record: RunRecord) -> pb.Run:
        progress = await asyncio.to_thread(self._runs.progress, record)
        return run_message(
            record,
            progress=progress,
            queue_position=self._runs.queue_position(record),
            export=self._exports.get(record.name),
        )


def _why(error: str) -> str:
    """How a process ended and the last line that it said: a status is too short for all of them."""
    lines = error.splitlines()
    return "\n".join((lines[0], lines[-1])) if len(lines) > 1 else error
