"""What a person sees of a command: bars and a table on a terminal, plain lines elsewhere; all on standard error."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from client.generation_types import (
    Accepted,
    Event,
    Neighbor,
    NeighborsFound,
    Queued,
    StageFinished,
    StageStarted,
    StepDone,
)

LINES_PER_TASK = 10


class Display(Protocol):
    """Shows what a command does, for as long as the context lasts."""

    def live(self) -> AbstractContextManager[object]:
        """The context in which the other methods are called."""
        ...

    def built(self, task: str, total: int, item: str) -> None:
        """One item of a building task is done."""
        ...

    def say(self, text: str) -> None:
        """Something that has no progress."""
        ...

    def show(self, event: Event) -> None:
        """What the generator says."""
        ...


def make_display() -> Display:
    """Bars where standard error is a terminal, lines elsewhere."""
    return Bars(Console(stderr=True)) if sys.stderr.isatty() else Lines(sys.stderr)


class Bars:
    """For a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._steps = _Steps()

    def live(self) -> AbstractContextManager[object]:
        return self._progress

    def built(self, task: str, total: int, item: str) -> None:
        self._progress.advance(self._task(task, total))

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    def show(self, event: Event) -> None:
        for text in _remarks(event):
            self.say(text)
        if isinstance(event, NeighborsFound):
            self._console.print(_table(event))
        self._steps.add(event)
        if isinstance(event, StageStarted | StepDone | StageFinished):
            done, total = self._steps.of(event.stage)
            self._progress.update(self._task(f"stage {event.stage}", total), completed=done, total=total)

    def _task(self, name: str, total: int) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        return self._tasks[name]


class Lines:
    """For a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._done: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._steps = _Steps()

    def live(self) -> AbstractContextManager[object]:
        return nullcontext()

    def built(self, task: str, total: int, item: str) -> None:
        self._done[task] += 1
        self._tell(task, self._done[task], total)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=self._stream, flush=True)

    def show(self, event: Event) -> None:
        if isinstance(event, NeighborsFound):
            for neighbor in event.neighbors:
                self.say("  ".join(("neighbor", *_cells(neighbor))))
        for text in _remarks(event):
            self.say(text)
        self._steps.add(event)
        if isinstance(event, StepDone | StageFinished):
            self._tell(f"stage {event.stage}", *self._steps.of(event.stage))

    def _tell(self, task: str, done: int, total: int) -> None:
        part = done * LINES_PER_TASK // total
        if part > self._told[task]:
            self._told[task] = part
            self.say(f"{task}: {done}/{total}")


class _Steps:
    """How far each stage is, all pictures together. A reader that falls behind is not told of every step."""

    def __init__(self) -> None:
        self._num_pictures = 1
        self._totals: dict[int, int] = {}
        self._done: dict[int, dict[int, int]] = {}

    def add(self, event: Event) -> None:
        match event:
            case Accepted():
                self._num_pictures = event.num_pictures
            case StageStarted():
                self._totals[event.stage] = event.steps
            case StepDone():
                self._totals[event.stage] = event.steps
                self._done.setdefault(event.stage, {})[event.picture] = event.step
            case StageFinished():
                self._done.setdefault(event.stage, {})[event.picture] = self._totals.get(event.stage, 1)

    def of(self, stage: int) -> tuple[int, int]:
        """Steps done, and steps to be done."""
        return sum(self._done.get(stage, {}).values()), self._totals.get(stage, 1) * self._num_pictures


def _remarks(event: Event) -> list[str]:
    match event:
        case Accepted():
            before = [_waiting(event.queue_position)] if event.queue_position else []
            return [f"seed {', '.join(dict.fromkeys(map(str, event.seeds or (event.seed,))))}", *before]
        case Queued():
            return [_waiting(event.queue_position)]
        case NeighborsFound():
            return [reason for reason in (event.shortfall_reason, event.degraded_reason) if reason]
    return []


def _waiting(queue_position: int) -> str:
    return "1 request goes before this one" if queue_position == 1 else f"{queue_position} requests go before this one"


_COLUMNS = ("rank", "score", "entity", "style", "author", "license")


def _table(found: NeighborsFound) -> Table:
    table = Table(title=f"neighbors from {found.knowledge_base}" if found.neighbors else "no neighbors")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for neighbor in found.neighbors:
        table.add_row(*_cells(neighbor))
    return table


def _cells(neighbor: Neighbor) -> tuple[str, ...]:
    return (
        str(neighbor.rank),
        f"{neighbor.score:.3f}",
        neighbor.entity or neighbor.caption,
        " ".join(neighbor.facets.values()),
        neighbor.author,
        neighbor.license,
    )
