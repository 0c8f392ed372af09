"""A run as TensorBoard event files, in `tensorboard/` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

ALL_PICTURES = 64
APART = {"kind", "time", "step", "examples"}


class TensorBoardLog:
    """Recorder of a run's lines and pictures; the horizontal axis is the step."""

    def __init__(self, folder: Path, step: int) -> None:
        """Events of a part of the run that was lost, after `step`, are hidden from view."""
        self._pictures = 0
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def stepped(self, figures: dict[str, float], examples: int) -> None:
        """Single steps are too many to keep."""

    def logged(self, line: dict[str, Any]) -> None:
        """A line of the log was written."""
        for name, value in line.items():
            if name not in APART and isinstance(value, int | float):
                self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._writer.flush()

    def saved(self, seconds: float) -> None:
        """A state was saved: the log says so."""

    def pictured(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture uint8 [H, W, 3] was drawn. The first ones are all kept, then half as many of each further doubling."""
        every = 1 << (self._pictures // ALL_PICTURES).bit_length()
        self._pictures += 1
        if (self._pictures - 1) % every:
            return
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
