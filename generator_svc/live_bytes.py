"""What orders keep in a stage while they live there, counted before it is taken."""

from __future__ import annotations

import threading

import torch

from common.service.errors import ResourceExhausted
from common.unet.config import LAYER_CHANNELS, PLACEMENT_SIZE, PREFERENCE_SIZE, UNetConfig

RETRY_AFTER_S = 5.0


class LiveBytes:
    """Room for what admitted orders keep, handed out until a limit; safe to use from several threads."""

    def __init__(self, limit: int, *, stage: int) -> None:
        """`limit` in bytes; `stage` is named where there is no room."""
        self._limit = limit
        self._stage = stage
        self._lock = threading.Lock()
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    def take(self, needed: int, *, num_pictures: int) -> None:
        """Take room; whoever does gives it back.

        Raises:
            ResourceExhausted: what is taken and this would be more than the limit.
        """
        with self._lock:
            if self._taken + needed > self._limit:
                raise ResourceExhausted(
                    f"stage {self._stage}: {num_pictures} pictures need {needed >> 20} MiB beside the"
                    f" {self._taken >> 20} MiB of others; the limit is {self._limit >> 20} MiB",
                    retry_after_s=RETRY_AFTER_S if self._taken else None,
                )
            self._taken += needed

    def give_back(self, taken: int) -> None:
        """Give back what `take` took."""
        with self._lock:
            assert self._taken >= taken, "more is given back than was taken"
            self._taken -= taken


def live_bytes(
    unet: UNetConfig, size: int, *, num_pictures: int, num_tokens: int, num_neighbors: int, element_bytes: int
) -> int:
    """Bytes that one order keeps while it lives in a stage: its condition, and x_t and x0 of each picture.

    What a pass of the network takes on top is bounded by the stage's batch, not by this. Neighbors that wait for the order's
    first step keep their pictures and captions, which are less than the keys and values that they then have.

    Args:
        num_tokens: of all its texts, the neighbors' captions excepted.
        element_bytes: of a number of the network.
    """
    keys_values = 0
    for level, width in enumerate(unet.widths):
        grid = (size // (unet.patch * 2**level)) ** 2
        if unet.text_attention[level]:
            keys_values += 2 * unet.blocks[level] * 2 * num_tokens * width  # DStack and UStack; keys and values
        if unet.neighbor_attention[level]:
            keys_values += 2 * num_neighbors * grid * width
    low_res = 3 * (size // unet.scale) ** 2 if unet.scale > 1 else 0
    states = 2 * 3 * size**2 * torch.float32.itemsize
    asked, laid = (1, num_neighbors) if unet.placement else (0, 0)
    pictures = LAYER_CHANNELS * size**2 * laid + PREFERENCE_SIZE * (asked + laid)
    shared = (keys_values + unet.embedding_width + PLACEMENT_SIZE + pictures) * element_bytes
    return shared + num_pictures * (states + low_res * element_bytes)
