"""Messages to plain data and back."""

from __future__ import annotations

from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from reimagen.trainer.v1 import trainer_pb2 as pb

from common.service.errors import InvalidArgument
from trainer.service.exports import ExportRecord
from trainer.service.run_log import Figures, Progress, SampleGrid
from trainer.service.run_record import RunRecord, RunState
from trainer.service.run_spec import ExecutorKind, PodResources, RunSpec
from trainer.service.spec_rules import total_examples

MAX_DURATION_S = 315_576_000_000  # of google.protobuf.Duration: some 10,000 years
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


def spec_of(message: pb.RunSpec) -> RunSpec:
    """What is to be trained.

    Raises:
        InvalidArgument: an enum's value is none, or a time is not positive or longer than a Duration can say.
    """
    pod = message.pod
    same: dict[str, Any] = {name: getattr(message, name) for name in _SAME}
    times: dict[str, Any] = {f"{name}_s": _seconds(message, name) for name in _TIMES}
    return RunSpec(
        **same,
        **times,
        parallel=_parallel(message.parallel),
        executor=_executor(message.executor),
        pod=PodResources(ranks=pod.ranks, gpus=pod.gpus, cpus=pod.cpus, memory_bytes=pod.memory_bytes),
    )


def states_of(numbers: Any) -> frozenset[RunState]:
    """The states of a request.

    Raises:
        InvalidArgument: one is none.
    """
    states = set()
    for i, number in enumerate(numbers):
        if number not in pb.RunState.values() or not number:
            raise InvalidArgument(f"states[{i}]", f"{number} is no state")
        states.add(RunState(pb.RunState.Name(number).removeprefix("RUN_STATE_").lower()))
    return frozenset(states)


def run_message(
    record: RunRecord, *, progress: Progress | None, queue_position: int, export: ExportRecord | None
) -> pb.Run:
    """A run as callers see it."""
    message = pb.Run(
        name=record.name,
        spec=_spec_message(record.spec),
        state=f"RUN_STATE_{record.state.upper()}",
        cancelling=record.cancel_asked_s is not None and not record.state.is_over,
        status=record.status,
        error=record.error,
        queue_position=queue_position,
        attempt=record.attempt,
        create_time=_time(record.created_s),
        start_time=_time(record.started_s),
        end_time=_time(record.ended_s),
        place=record.place,
    )
    if progress is not None:
        message.progress.CopyFrom(
            pb.Progress(
                step=progress.step,
                examples=progress.examples,
                total_examples=total_examples(record.spec),
                examples_per_second=progress.examples_per_second,
                loss=progress.loss,
                time=_time(progress.time_s),
            )
        )
    if export is not None:
        message.export.CopyFrom(export_message(export))
    return message


def export_message(record: ExportRecord) -> pb.Export:
    """An export as callers see it."""
    return pb.Export(
        weights=record.weights,
        state=f"EXPORT_STATE_{record.state.upper()}",
        done=record.done,
        total=record.total,
        status=record.status,
        error=record.error,
        start_time=_time(record.started_s),
        end_time=_time(record.ended_s),
    )


def figures_message(line: Figures) -> pb.WatchRunResponse:
    """A line of the log."""
    return pb.WatchRunResponse(
        figures=pb.Figures(
            kind=line.kind, step=line.step, examples=line.examples, time=_time(line.time_s), values=line.values
        )
    )


def grid_message(grid: SampleGrid) -> pb.WatchRunResponse:
    """A sample grid."""
    return pb.WatchRunResponse(
        samples=pb.SampleGrid(step=grid.step, examples=grid.examples, png=grid.png, time=_time(grid.time_s))
    )


def _spec_message(spec: RunSpec) -> pb.RunSpec:
    message = pb.RunSpec(
        **{name: getattr(spec, name) for name in _SAME},
        executor=f"EXECUTOR_{spec.executor.upper()}" if spec.executor else None,
        parallel=f"PARALLEL_{spec.parallel.upper()}" if spec.parallel else None,
    )
    for name in _TIMES:
        seconds = getattr(spec, f"{name}_s")
        if seconds:
            getattr(message, name).FromNanoseconds(round(seconds * 1e9))
    if spec.pod != PodResources():
        message.pod.CopyFrom(pb.PodResources(**vars(spec.pod)))
    return message


def _seconds(message: pb.RunSpec, name: str) -> float:
    if not message.HasField(name):  # pyright: ignore[reportArgumentType]
        return 0.0
    given: Duration = getattr(message, name)
    seconds = given.seconds + given.nanos / 1e9
    if seconds <= 0:
        raise InvalidArgument(f"spec.{name}", f"{seconds:g} s is not a positive time")
    if seconds > MAX_DURATION_S:  # accepted, it could never be told again
        raise InvalidArgument(f"spec.{name}", f"{seconds:g} s is more than {MAX_DURATION_S} s")
    return seconds


def _parallel(number: int) -> str:
    if number not in pb.Parallel.values():
        raise InvalidArgument("spec.parallel", f"{number} is none of them")
    return pb.Parallel.Name(number).removeprefix("PARALLEL_").lower() if number else ""


def _executor(number: int) -> ExecutorKind | None:
    if number not in pb.Executor.values():
        raise InvalidArgument("spec.executor", f"{number} is no executor")
    return ExecutorKind(pb.Executor.Name(number).removeprefix("EXECUTOR_").lower()) if number else None


def _time(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp
