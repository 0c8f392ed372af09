"""What one stage is given, as plain arrays: the same whether it runs in this process or in another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.text import TextEncoder
from common.unet.config import UNetConfig
from generator_svc.neighbors import Neighbor, draw_neighbors


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """The conditions of one order's pictures in one stage.

    Attributes:
        text, text_mask: token states of the prompt float32 [L, D], bool [L]; L = D = 0 for weights without text.
        neighbors: uint8 [K, S, S, 3]; K = 0 for weights without neighbors.
        neighbor_text, neighbor_text_mask: token states of their captions float32 [K, L, D], bool [K, L].
        low_res: float32 in [-1, 1] [P, 3, h, w], one for each picture; None in the first stage.
        negative_text, negative_text_mask: token states of what is not to be drawn float32 [L, D], bool [L], read wherever
            guidance leaves the text out; None: nothing is read there.
        start: the picture that trajectories begin with, see `Plan.start_time`: float32 in [-1, 1] [P or 1, 3, S, S]; None:
            they begin with noise.
    """

    text: np.ndarray
    text_mask: np.ndarray
    neighbors: np.ndarray
    neighbor_text: np.ndarray
    neighbor_text_mask: np.ndarray
    low_res: np.ndarray | None
    negative_text: np.ndarray | None = None
    negative_text_mask: np.ndarray | None = None
    start: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Token states of the prompt and of the K captions after it: float32 [1 + K, L, D] and bool [1 + K, L]."""

    states: np.ndarray
    mask: np.ndarray


class Texts:
    """Encodes prompts and captions; safe to use from several threads (a tokenizer is not)."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()

    def encode(self, prompt: str, captions: Sequence[str]) -> EncodedTexts:
        """The token states of a prompt and its neighbors' captions."""
        with self._lock:
            states, mask = self._encoder.encode([prompt, *captions])
        return EncodedTexts(states=states.cpu().numpy(), mask=mask.cpu().numpy())


def make_inputs(
    unet: UNetConfig, size: int, texts: EncodedTexts, neighbors: Sequence[Neighbor], low_res: np.ndarray | None
) -> StageInputs:
    """The inputs of a stage: of texts and neighbors, what its U-Net reads.

    Args:
        unet: the stage's architecture.
        size: side of the stage's picture; neighbors are drawn at this side.
        low_res: what the stage before made [P, 3, h, w]; None in the first stage.

    Raises:
        DataLoss: a neighbor's picture cannot be drawn.
    """
    seen = tuple(neighbors) if unet.uses_neighbors else ()
    if unet.text_width:
        states, mask = texts.states, texts.mask
    else:
        states, mask = np.zeros((1 + len(neighbors), 0, 0), np.float32), np.zeros((1 + len(neighbors), 0), np.bool_)
    return StageInputs(
        text=states[0],
        text_mask=mask[0],
        neighbors=draw_neighbors(seen, size),
        neighbor_text=states[1 : 1 + len(seen)],
        neighbor_text_mask=mask[1 : 1 + len(seen)],
        low_res=low_res,
    )
