"""What a run says, as it says it: its state, its figures, its sample grids."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from common.service.errors import Unavailable
from trainer.presets import PRESETS
from trainer.service.run_log import HELD_OUT, Figures, GridTail, LogTail, SampleGrid
from trainer.service.run_record import RunRecord
from trainer.service.runs import Runs

END_RETRY_S = 1.0

Told = RunRecord | Figures | SampleGrid


class RunWatch:
    """Watches runs until they are over."""

    def __init__(self, runs: Runs, *, root: Path, poll_s: float) -> None:
        """`root` holds the runs' folders, which are looked into every `poll_s` seconds."""
        self._runs = runs
        self._root = root
        self._poll_s = poll_s
        self._is_ending = False

    def end(self) -> None:
        """Send the watchers away: they are told to come back."""
        self._is_ending = True

    async def follow(self, name: str, *, from_step: int, samples: bool) -> AsyncGenerator[Told, None]:
        """See WatchRun in trainer.proto. Every line and grid is told once, a grid before the lines past it.

        Raises:
            NotFound: there is no such run. Unavailable: the service ends.
        """
        told = self._runs.get(name)
        yield told
        reader = _Reader(self._root / name, told.spec.preset, from_step=from_step, samples=samples)
        while True:
            record = self._runs.get(name)  # looked at before the log: of a run that is over nothing is missed
            if not record.state.is_over and _shown(record) != _shown(told):
                told = record
                yield record
            while found := await asyncio.to_thread(reader.read):
                for event in found:
                    yield event
            if record.state.is_over:
                yield record
                return
            await self.pause()

    async def pause(self) -> None:
        """Until the next look.

        Raises:
            Unavailable: the service ends.
        """
        if self._is_ending:
            raise Unavailable("the service is stopping", retry_after_s=END_RETRY_S, reason="STOPPING")
        await asyncio.sleep(self._poll_s)


class _Reader:
    """The figures and grids of one run, from a step on."""

    def __init__(self, folder: Path, preset: str, *, from_step: int, samples: bool) -> None:
        self._lines = LogTail(folder)
        self._grids = GridTail(folder) if samples else None
        self._waiting: list[tuple[int, Path]] = []  # grids that are yet to be told
        self._from_step = from_step
        self._batch = PRESETS[preset].batch if preset in PRESETS else 1
        self._steps: dict[int, int] = {}  # of held-out lines, by their examples

    def read(self) -> list[Figures | SampleGrid]:
        """What has come since; empty where nothing has."""
        if self._grids is not None:
            self._waiting = sorted(self._waiting + self._grids.find())
        while True:
            lines = self._lines.read()
            found = list(self._merged(lines))
            if found or not lines:  # lines before `from_step` are passed over
                return found

    def _merged(self, lines: Sequence[Figures]) -> Iterator[Figures | SampleGrid]:
        for line in lines:
            if line.kind == HELD_OUT:
                self._steps[line.examples] = line.step
            yield from self._drawn(before=line.examples)
            if line.step >= self._from_step:
                yield line
        if not lines:  # nothing is left to read
            yield from self._drawn(before=math.inf)

    def _drawn(self, *, before: float) -> Iterator[SampleGrid]:
        while self._waiting and self._waiting[0][0] < before:
            examples, path = self._waiting.pop(0)
            step = self._steps.get(examples, examples // self._batch)
            if step < self._from_step:
                continue
            try:
                png, time_s = path.read_bytes(), path.stat().st_mtime
            except FileNotFoundError:
                continue
            yield SampleGrid(step=step, examples=examples, png=png, time_s=time_s)


def _shown(record: RunRecord) -> RunRecord:
    """What a watcher is told of: not how requests are remembered."""
    return replace(record, requests={})
