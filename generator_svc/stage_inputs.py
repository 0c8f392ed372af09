"""What one stage is given, as plain arrays: the same whether it runs in this process or in another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.unet.config import UNetConfig

if TYPE_CHECKING:  # a served stage has no use for transformers: half of its start, 60 MB
    from common.text import TextEncoder


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
    """Token states of N texts: float32 [N, L, D] and bool [N, L], L the longest one's tokens."""

    states: np.ndarray
    mask: np.ndarray


class Texts:
    """Encodes texts; safe to use from several threads (a tokenizer is not)."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The token states of some texts, at least one."""
        with self._lock:
            states, mask = self._encoder.encode(texts)
        return EncodedTexts(states=states.cpu().numpy(), mask=mask.cpu().numpy())


@dataclass(frozen=True, kw_only=True)
class OrderTexts:
    """Everything that an order says in words: prompt, what is not to be drawn (or nothing), captions."""

    prompt: str
    negative: str
    captions: tuple[str, ...]

    def in_order(self) -> list[str]:
        """The texts as `make_inputs` expects their states."""
        return [self.prompt, *([self.negative] if self.negative else []), *self.captions]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a stage begins with, besides noise.

    Attributes:
        low_res: the picture before it float32 in [-1, 1] [P, 3, h, w]; None in the first stage.
        picture: see `StageInputs.start`.
    """

    low_res: np.ndarray | None = None
    picture: np.ndarray | None = None


def make_inputs(
    unet: UNetConfig, size: int, texts: OrderTexts, encoded: EncodedTexts, pictures: np.ndarray, start: Start
) -> StageInputs:
    """The inputs of a stage: of texts and neighbors, what its U-Net reads.

    Args:
        unet: the stage's architecture.
        size: side of the stage's picture.
        texts, encoded: the texts, and the states of `texts.in_order()`.
        pictures: the neighbors' uint8 [K, size, size, 3]; K = 0 where the U-Net reads none.
    """
    first = 2 if texts.negative else 1
    states, mask = encoded.states, encoded.mask
    if not unet.text_width:
        states, mask = np.zeros((len(states), 0, 0), np.float32), np.zeros((len(states), 0), np.bool_)
    has_negative = bool(texts.negative) and unet.text_width > 0
    return StageInputs(
        text=states[0],
        text_mask=mask[0],
        neighbors=pictures,
        neighbor_text=states[first : first + len(pictures)],
        neighbor_text_mask=mask[first : first + len(pictures)],
        low_res=start.low_res,
        negative_text=states[1] if has_negative else None,
        negative_text_mask=mask[1] if has_negative else None,
        start=start.picture,
    )
