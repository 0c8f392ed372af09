"""Stages and text encoder in this process, behind the protocols of `stage_backend.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
from torch import Tensor

from common.diffusion.plan import Plan
from common.text import TextEncoder
from generator_svc.call import Call
from generator_svc.stage_backend import OnStep, StageInfo, StageNeeds
from generator_svc.stage_inputs import EncodedTexts, StageInputs, Texts
from generator_svc.stage_runtime import Seat, StageRuntime

IN_PROCESS = "in process"


class EmbeddedSeat:
    """Room in a runtime of this process."""

    def __init__(self, info: StageInfo, seat: Seat) -> None:
        self.info = info
        self._seat = seat

    async def run(
        self, plans: Sequence[Plan], inputs: StageInputs, *, on_step: OnStep, preview_every: int, call: Call
    ) -> np.ndarray:
        """See `StageSeat.run`."""
        loop = asyncio.get_running_loop()
        has_ended = False

        def tell(picture: int, step: int, x0: np.ndarray | None) -> None:
            if not has_ended:
                on_step(picture, step, x0)

        def report(picture: int, step: int, x0: Tensor) -> None:
            """Told by the runtime, on its thread."""
            is_wanted = preview_every > 0 and step % preview_every == 0
            loop.call_soon_threadsafe(tell, picture, step, x0.cpu().numpy() if is_wanted else None)

        future = self._seat.submit(plans, inputs, on_step=report, is_cancelled=call.is_cancelled)
        try:
            return await asyncio.wrap_future(future)  # its cancellation is the future's
        finally:
            has_ended = True


class EmbeddedStage:
    """A stage that runs in this process."""

    def __init__(
        self, runtime: StageRuntime, info: StageInfo, *, on_taken: Callable[[int], object] = lambda taken_bytes: None
    ) -> None:
        """`on_taken` is told the bytes that admitted orders keep, whenever that changes; the runtime stays the caller's."""
        self._runtime = runtime
        self._info = info
        self._on_taken = on_taken

    async def info(self) -> StageInfo:
        """See `StageBackend.info`."""
        return self._info

    @asynccontextmanager
    async def reserve(self, needs: StageNeeds) -> AsyncIterator[EmbeddedSeat]:
        """See `StageBackend.reserve`."""
        try:
            with self._runtime.reserve(
                num_pictures=needs.num_pictures, num_tokens=needs.num_tokens, num_neighbors=needs.num_neighbors
            ) as seat:
                self._on_taken(self._runtime.taken_bytes)
                yield EmbeddedSeat(self._info, seat)
        finally:
            self._on_taken(self._runtime.taken_bytes)


class EmbeddedTexts:
    """The text encoder in this process."""

    def __init__(self, encoder: TextEncoder, name: str) -> None:
        """`name` is the one that records bear."""
        self.name = name
        self.width = encoder.width
        self._texts = Texts(encoder)

    async def encode(self, texts: Sequence[str], *, call: Call) -> EncodedTexts:
        """See `TextBackend.encode`."""
        return await asyncio.to_thread(self._texts.encode, texts)
