"""How far a command is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINES = 10

Progress = Callable[[str, int, int], None]
"""Told the task, how much of it is done, and how much there is."""


def make_progress() -> Progress:
    """For standard error. A task begins when it is first told of, and may be told of 0 done."""
    return _bars() if sys.stderr.isatty() else _lines()


def _bars() -> Progress:
    bars: dict[str, tqdm] = {}

    def report(task: str, done: int, total: int) -> None:
        bar = bars.setdefault(task, tqdm(desc=task, total=total, initial=done))
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bars.pop(task, None)

    return report


def _lines() -> Progress:
    told: dict[str, int] = {}
    started = time.monotonic()

    def report(task: str, done: int, total: int) -> None:
        part = LINES * done // max(total, 1)
        if told.get(task) != part:
            told[task] = part
            print(f"{time.monotonic() - started:7.1f} s  {task}: {done}/{total}", file=sys.stderr, flush=True)

    return report
