"""From the stage that draws to the coroutine that tells the caller about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

MAX_WAITING_STEPS = 256  # a reader that is further behind misses steps
MAX_WAITING_PREVIEWS = 4  # a 1024 preview keeps 12 MB until it is read


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of one picture; `x0` float32 [3, S, S] where a preview is wanted, and the reader is not behind."""

    picture: int
    step: int
    x0: np.ndarray | None


class Progress:
    """The steps of one order in one stage, in order; it never holds up whoever takes them. Of one event loop."""

    def __init__(self) -> None:
        self._steps: asyncio.Queue[Step | None] = asyncio.Queue()
        self._num_previews = 0

    def report(self, picture: int, step: int, x0: np.ndarray | None) -> None:
        """Take a step in; an `OnStep` of `stage_backend`."""
        if self._steps.qsize() < MAX_WAITING_STEPS:
            preview = x0 if self._num_previews < MAX_WAITING_PREVIEWS else None
            self._num_previews += preview is not None
            self._steps.put_nowait(Step(picture=picture, step=step, x0=preview))

    async def until_done(self, running: asyncio.Future[np.ndarray]) -> AsyncIterator[Step]:
        """Every step that is reported before `running` is done."""
        running.add_done_callback(lambda _: self._steps.put_nowait(None))
        while (step := await self._steps.get()) is not None:
            self._num_previews -= step.x0 is not None
            yield step
