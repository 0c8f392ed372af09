"""What turns texts and pictures into vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """A dual encoder. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """Names the weights: equal names give equal embeddings."""
        ...

    @property
    def size(self) -> int:
        """Size of the embeddings."""
        ...

    @property
    def image_side(self) -> int:
        """Pictures are best given at this side, in pixels."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, size], rows of unit length."""
        ...

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The same of uint8 RGB pictures [H, W, 3]."""
        ...
