"""What can be asked of the trainer: each a call with plain data in and out, for asyncio and without."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from reimagen.trainer.v1 import trainer_pb2 as pb
from reimagen.trainer.v1 import trainer_pb2_grpc as pb_grpc

from client.call import Call
from client.errors import ServiceFailed
from client.message_fields import FieldError, fitted, name_of, names_of, number_of
from client.training_types import Export, Figures, PodResources, Progress, Run, RunEvent, RunSpec, SampleGrid

TIMEOUT_S = 60.0
WATCH_TIMEOUT_S = 90 * 86_400.0
SERVICES = ("reimagen.trainer.v1.TrainerService",)
EXECUTORS = names_of(pb.Executor, "EXECUTOR")
STATES = names_of(pb.RunState, "RUN_STATE")
PARALLEL = names_of(pb.Parallel, "PARALLEL")
_SAME = (
    "preset",
    "data",
    "examples",
    "ranks",
    "threads",
    "side",
    "start_from",
    "evaluate_every_steps",
    "save_every_steps",
)
_TIMES = ("limit", "evaluate_every", "log_every", "save_every")  # of a spec; here in seconds, NAME_s

T = TypeVar("T")
Page = tuple[list[Run], str]
"""Runs, and the token of the next page; empty on the last one."""


class TrainingFailed(ServiceFailed):
    """The trainer refused a request or failed."""


def start(spec: RunSpec, name: str, request_id: str) -> Call[Run]:
    """Starts a run. May be repeated: the request has an id.

    Raises:
        FieldError: an executor is none of the contract's, or a number does not fit its field.
    """
    request = pb.StartRunRequest(run=name, spec=_spec_message(spec), request_id=request_id or str(uuid.uuid4()))
    return _call("StartRun", request, lambda said: run_of(said.run))


def get(name: str) -> Call[Run]:
    """One run."""
    return _call("GetRun", pb.GetRunRequest(run=name), lambda said: run_of(said.run))


def list_page(states: Sequence[str], page_size: int, token: str) -> Call[Page]:
    """Runs in these states; none: in any."""
    request = fitted(
        pb.ListRunsRequest,
        page_size=page_size,
        page_token=token,
        states=[number_of(pb.RunState, "RUN_STATE", "states", state) for state in states],
    )
    return _call("ListRuns", request, lambda said: ([run_of(run) for run in said.runs], said.next_page_token))


def watch(name: str, from_step: int, samples: bool) -> Call[RunEvent]:
    """What a run says."""
    request = fitted(pb.WatchRunRequest, run=name, from_step=from_step, omit_samples=not samples)
    return _call("WatchRun", request, event_of)


def cancel(name: str) -> Call[Run]:
    """Ends a run. May be repeated: cancelling again changes nothing."""
    return _call("CancelRun", pb.CancelRunRequest(run=name), lambda said: run_of(said.run))


def delete(name: str, missing_ok: bool) -> Call[None]:
    """Removes a run. May be repeated: NOT_FOUND then, unless `missing_ok`."""
    return _call("DeleteRun", pb.DeleteRunRequest(run=name, allow_missing=missing_ok), lambda said: None)


def export(name: str, weights: str, request_id: str, replace: bool) -> Call[Export]:
    """Writes a run's weights. May be repeated: the request has an id."""
    named = request_id or str(uuid.uuid4())
    request = pb.ExportRunRequest(run=name, weights=weights, request_id=named, replace=replace)
    return _call("ExportRun", request, lambda said: export_of(said.export))


def exported(last: Export | None) -> Export:
    """How an export ended, from the last thing that was said of it.

    Raises:
        TrainingFailed: nothing was said of its end.
    """
    if last is None or last.state != "succeeded":
        raise TrainingFailed("ABORTED", "the trainer ended the stream before the export was done")
    return last


def event_of(said: pb.WatchRunResponse) -> RunEvent:
    """What a run says.

    Raises:
        TrainingFailed: it is newer than this client.
    """
    match said.WhichOneof("event"):
        case "run":
            return run_of(said.run)
        case "figures":
            line = said.figures
            return Figures(
                kind=line.kind,
                step=line.step,
                examples=line.examples,
                time=_time(line, "time"),
                values=dict(line.values),
            )
        case "samples":
            grid = said.samples
            return SampleGrid(step=grid.step, examples=grid.examples, time=_time(grid, "time"), png=grid.png)
    raise TrainingFailed("UNIMPLEMENTED", "the trainer says something that is newer than this client")


def run_of(said: pb.Run) -> Run:
    """A run."""
    return Run(
        name=said.name,
        spec=_spec_of(said.spec),
        state=name_of(pb.RunState, "RUN_STATE", said.state),
        cancelling=said.cancelling,
        status=said.status,
        error=said.error,
        queue_position=said.queue_position,
        attempt=said.attempt,
        created_at=_time(said, "create_time"),
        started_at=_time(said, "start_time"),
        ended_at=_time(said, "end_time"),
        progress=_progress_of(said.progress) if said.HasField("progress") else None,
        export=export_of(said.export) if said.HasField("export") else None,
        place=said.place,
    )


def export_of(said: pb.Export) -> Export:
    """An export."""
    return Export(
        weights=said.weights,
        state=name_of(pb.ExportState, "EXPORT_STATE", said.state),
        done=said.done,
        total=said.total,
        status=said.status,
        error=said.error,
        started_at=_time(said, "start_time"),
        ended_at=_time(said, "end_time"),
    )


def _call(method: str, request: Message, read: Callable[[Any], T]) -> Call[T]:
    return Call(stub=pb_grpc.TrainerServiceStub, method=method, request=request, read=read)


def _spec_message(spec: RunSpec) -> pb.RunSpec:
    pod = None if spec.pod is None else fitted(pb.PodResources, "spec.pod.", **vars(spec.pod))
    return fitted(
        pb.RunSpec,
        "spec.",
        **{name: getattr(spec, name) for name in _SAME},
        **{name: _duration(name, getattr(spec, f"{name}_s")) for name in _TIMES},
        parallel=number_of(pb.Parallel, "PARALLEL", "spec.parallel", spec.parallel),
        executor=number_of(pb.Executor, "EXECUTOR", "spec.executor", spec.executor),
        pod=pod,
    )


def _spec_of(said: pb.RunSpec) -> RunSpec:
    def seconds(name: str) -> float | None:
        return getattr(said, name).ToNanoseconds() / 1e9 if said.HasField(name) else None  # pyright: ignore

    pod = said.pod
    same: dict[str, Any] = {name: getattr(said, name) for name in _SAME}
    times: dict[str, Any] = {f"{name}_s": seconds(name) for name in _TIMES}
    return RunSpec(
        **same,
        **times,
        parallel=name_of(pb.Parallel, "PARALLEL", said.parallel) if said.parallel else "",
        executor=name_of(pb.Executor, "EXECUTOR", said.executor) if said.executor else "",
        pod=PodResources(ranks=pod.ranks, gpus=pod.gpus, cpus=pod.cpus, memory_bytes=pod.memory_bytes)
        if said.HasField("pod")
        else None,
    )


def _progress_of(said: pb.Progress) -> Progress:
    return Progress(
        step=said.step,
        examples=said.examples,
        total_examples=said.total_examples,
        examples_per_second=said.examples_per_second,
        loss=said.loss if said.HasField("loss") else None,
        time=_time(said, "time"),
    )


def _duration(field: str, seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError) as error:
        raise FieldError(f"spec.{field}: {seconds}: {error}") from None
    return duration


def _time(message: Any, field: str) -> str:
    stamp: Timestamp = getattr(message, field)
    return stamp.ToJsonString() if message.HasField(field) else ""
