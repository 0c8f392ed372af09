"""Every random number of a picture comes from (seed, stage, sample index, purpose).

Drawn by a counter-based generator on the host, so that a picture is the same on any device, on any replica, and whatever
it was batched with.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["start", "steps", "augmentation", "branches"]
_PURPOSES: tuple[Purpose, ...] = ("start", "steps", "augmentation", "branches")
MAX_SEED = 2**63 - 1


def generator(seed: int, stage: int, sample: int, purpose: Purpose) -> np.random.Generator:
    """A generator of its own for one purpose of one sample of one stage.

    Raises:
        ValueError: the seed is not in [0, 2^63 - 1].
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed: {seed} is not in [0, {MAX_SEED}]")
    entropy = np.random.SeedSequence([seed, stage, sample, _PURPOSES.index(purpose)])
    return np.random.Generator(np.random.Philox(entropy))


def normal(source: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 of `shape`."""
    return source.standard_normal(shape, dtype=np.float32)
