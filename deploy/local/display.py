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

from client.generator import Accepted, Event, Neighbor, NeighborsFound, StageFinished, StageStarted, StepDone

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

    def live(self) -> AbstractContextManager[object]:
        return self._progress

    def built(self, task: str, total: int, item: str) -> None:
        self._progress.advance(self._task(task, total))

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)

    def show(self, event: Event) -> None:
        match event:
            case Accepted():
                self.say(f"seed {event.seed}")
            case NeighborsFound():
                self._console.print(_table(event))
                if event.shortfall_reason:
                    self.say(event.shortfall_reason)
            case StageStarted():
                self._task(f"stage {event.stage}", event.steps)
            case StepDone():
                self._progress.update(self._task(f"stage {event.stage}", event.steps), completed=event.step)
            case StageFinished():
                task = self._progress.tasks[self._tasks[f"stage {event.stage}"]]
                self._progress.update(task.id, completed=task.total)

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

    def live(self) -> AbstractContextManager[object]:
        return nullcontext()

    def built(self, task: str, total: int, item: str) -> None:
        self._done[task] += 1
        self._tell(task, self._done[task], total)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=self._stream, flush=True)

    def show(self, event: Event) -> None:
        match event:
            case Accepted():
                self.say(f"seed {event.seed}")
            case NeighborsFound():
                for neighbor in event.neighbors:
                    self.say("  ".join(("neighbor", *_cells(neighbor))))
                if event.shortfall_reason:
                    self.say(event.shortfall_reason)
            case StepDone():
                self._tell(f"stage {event.stage}", event.step, event.steps)

    def _tell(self, task: str, done: int, total: int) -> None:
        if done * LINES_PER_TASK // total != (done - 1) * LINES_PER_TASK // total:
            self.say(f"{task}: {done}/{total}")


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
        neighbor.entity,
        " ".join(neighbor.facets.values()),
        neighbor.author,
        neighbor.license,
    )
