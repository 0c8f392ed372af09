"""What a person sees of training: a bar on a terminal, plain lines elsewhere; all on standard error."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from client.training_types import Export, Figures, Run, RunEvent, SampleGrid

_HELD_OUT, _TRAIN = "held_out", "train"
_NAMED_FIRST = ("loss", "full", "text_only", "neighbors_only", "none", "wrong_neighbors", "examples_per_s")
_UNNAMED = ("learning_rate", "skipped", "data_wait_s", "step_s")


class TrainDisplay(Protocol):
    """Shows what a run or an export does, for as long as the context lasts."""

    def live(self) -> AbstractContextManager[object]:
        """The context in which the other methods are called."""
        ...

    def show(self, event: RunEvent) -> None:
        """What a run says."""
        ...

    def exported(self, export: Export) -> None:
        """How far an export is."""
        ...


def make_train_display() -> TrainDisplay:
    """A bar where standard error is a terminal, lines elsewhere."""
    return TrainBar(Console(stderr=True)) if sys.stderr.isatty() else TrainLines(sys.stderr)


class TrainBar:
    """For a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._told = ""

    def live(self) -> AbstractContextManager[object]:
        return self._progress

    def show(self, event: RunEvent) -> None:
        match event:
            case Run():
                self._say(_state(event))
                if event.progress is not None:
                    self._move(event.name, event.progress.examples, event.progress.total_examples)
            case Figures() if event.kind == _TRAIN:
                self._move("", event.examples, None, _values(event))
            case Figures():
                self._move("", event.examples, None)
                self._say(_line(event))
            case SampleGrid():
                self._say(_grid(event))

    def exported(self, export: Export) -> None:
        self._move(f"export to {export.weights}", export.done, export.total or None, export.status)

    def _move(self, name: str, done: int, total: int | None, figures: str | None = None) -> None:
        if self._task is None:
            self._task = self._progress.add_task(name, total=None, figures="")
        self._progress.update(self._task, completed=done)
        if name:
            self._progress.update(self._task, description=name)
        if total:
            self._progress.update(self._task, total=total)
        if figures is not None:
            self._progress.update(self._task, figures=figures)

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._console.print(text, style="dim", highlight=False, markup=False)


class TrainLines:
    """For a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._told = ""

    def live(self) -> AbstractContextManager[object]:
        return nullcontext()

    def show(self, event: RunEvent) -> None:
        match event:
            case Run():
                self._say(_state(event))
            case Figures():
                self._say(_line(event))
            case SampleGrid():
                self._say(_grid(event))

    def exported(self, export: Export) -> None:
        steps = f" {export.done}/{export.total}" if export.total else ""
        self._say(f"export to {export.weights}: {export.state}{steps} {export.status}".rstrip())

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=self._stream, flush=True)


def _state(run: Run) -> str:
    state = "ends" if run.cancelling else run.state
    where = f", {run.queue_position} in the queue" if run.queue_position else f", {run.place}" if run.place else ""
    again = f", attempt {run.attempt}" if run.attempt > 1 else ""
    why = f": {run.status}" if run.status else ""
    return f"{run.name} {state}{where}{again}{why}"


def _line(line: Figures) -> str:
    return f"step {line.step}  {line.examples} examples  {line.kind.replace('_', ' ')}  {_values(line)}"


def _grid(grid: SampleGrid) -> str:
    return f"step {grid.step}  {grid.examples} examples  samples"


def _values(line: Figures) -> str:
    names = [name for name in _NAMED_FIRST if name in line.values]
    names += [name for name in sorted(line.values) if name not in (*names, *_UNNAMED)]
    return "  ".join(f"{name} {line.values[name]:.4g}" for name in names)
