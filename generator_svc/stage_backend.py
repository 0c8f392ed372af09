"""Where a stage runs is nobody's business but its backend's: the pipeline knows these protocols alone.

`embedded_stage.py` runs a stage in this process, `triton_client.py` in Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from common.diffusion.plan import Plan
from common.unet.config import UNetConfig
from generator_svc.call import Call
from generator_svc.stage_inputs import EncodedTexts, StageInputs

OnStep = Callable[[int, int, np.ndarray | None], None]
"""(picture, steps done, estimated x0 float32 [3, S, S] where a preview was asked for), in the caller's event loop."""


@dataclass(frozen=True, kw_only=True)
class StageInfo:
    """One stage as it is served now; the fields are those of `StageModel` in generator.proto.

    Attributes:
        stage: side of its picture.
        unet: architecture of the weights that are served: what they read.
        version: in the model repository; "0" in process.
        weights_sha256: of the safetensors file.
        parameters: how many numbers the weights hold.
        trained: preset, steps and examples seen, fingerprint of the corpus, as the manifest has them.
        endpoints: addresses, or "in process".
    """

    stage: int
    unet: UNetConfig
    version: str
    weights_sha256: str
    parameters: int
    trained: Mapping[str, Any] = field(default_factory=dict)
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageNeeds:
    """What an order will keep in a stage while it lives there.

    Attributes:
        num_pictures: trajectories.
        num_tokens: of all its texts, the neighbors' captions excepted.
        num_neighbors: K.
    """

    num_pictures: int
    num_tokens: int
    num_neighbors: int


class StageSeat(Protocol):
    """Room for one order's pictures in a stage."""

    @property
    def info(self) -> StageInfo:
        """What `run` draws with: the version that served when the seat was taken."""
        ...

    async def run(
        self, plans: Sequence[Plan], inputs: StageInputs, *, on_step: OnStep, preview_every: int, call: Call
    ) -> np.ndarray:
        """Run a trajectory for each plan, side by side.

        Cancelling the coroutine, `call` being cancelled or past its deadline, and leaving the seat all stop the
        trajectories before their next step.

        Args:
            plans: one for each picture, alike but for seed and sample.
            inputs: what they are conditioned on.
            on_step: told after every step of every picture; never called again once the coroutine has ended.
            preview_every: tell the estimate with every n-th step; 0: with none.
            call: who waits.

        Returns:
            float32 in [-1, 1] [P, 3, S, S].

        Raises:
            ResourceExhausted, Unavailable, DeadlineExceeded: as generator.proto says.
            InvalidArgument: the plans do not fit the inputs.
        """
        ...


class StageBackend(Protocol):
    """One stage, wherever it runs. Closed by whoever made it."""

    async def info(self) -> StageInfo:
        """What is served now.

        Raises:
            Unavailable: no endpoint answers.
        """
        ...

    def reserve(self, needs: StageNeeds) -> AbstractAsyncContextManager[StageSeat]:
        """Take room for an order, for as long as the block lasts; what is not done at its end is dropped.

        Raises:
            ResourceExhausted: there is no room; before any work is done.
            Unavailable: no endpoint answers.
        """
        ...


class TextBackend(Protocol):
    """The frozen text encoder, wherever it runs."""

    @property
    def name(self) -> str:
        """The name that records bear."""
        ...

    @property
    def width(self) -> int:
        """Of a token's state."""
        ...

    async def encode(self, texts: Sequence[str], *, call: Call) -> EncodedTexts:
        """Token states of each text, float32 [N, L, width] and bool [N, L], L at most MAX_TOKENS.

        Raises:
            ResourceExhausted, Unavailable, DeadlineExceeded: as generator.proto says.
        """
        ...
