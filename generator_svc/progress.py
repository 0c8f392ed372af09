"""From the thread that runs a stage to the coroutine that tells the caller about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_WAITING_STEPS = 256  # a reader that is further behind misses steps
MAX_WAITING_PREVIEWS = 4  # a 1024 preview keeps 12 MB until it is read


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of one picture; `x0` float32 [3, S, S] where a preview is wanted."""

    picture: int
    step: int
    x0: np.ndarray | None


class Progress:
    """The steps of one order in one stage, in order; it never holds up the thread that runs them."""

    def __init__(self, *, preview_every: int) -> None:
        """Made in the event loop that will read it; `preview_every` 0 wants no previews."""
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | None] = asyncio.Queue()
        self._preview_every = preview_every
        self._num_previews = 0

    def report(self, picture: int, step: int, x0: Tensor) -> None:
        """Told by the runtime, on its thread."""
        is_wanted = self._preview_every > 0 and step % self._preview_every == 0
        preview = x0.cpu().numpy() if is_wanted and self._num_previews < MAX_WAITING_PREVIEWS else None
        self._loop.call_soon_threadsafe(self._put, Step(picture=picture, step=step, x0=preview))

    async def until_done(self, future: Future[np.ndarray]) -> AsyncIterator[Step]:
        """Every step that is reported before `future` is done."""
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._steps.put_nowait, None))
        while (step := await self._steps.get()) is not None:
            self._num_previews -= step.x0 is not None
            yield step

    def _put(self, step: Step) -> None:
        if self._steps.qsize() < MAX_WAITING_STEPS:
            self._num_previews += step.x0 is not None
            self._steps.put_nowait(step)
