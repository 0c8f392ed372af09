"""From a run's state to the weights that a server loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import publish_stage
from trainer.fit import Trainer
from trainer.look import read_log
from trainer.parity import check_parity


def publish(
    trainer: Trainer,
    weights: Path,
    fingerprint: str,
    *,
    dtype: torch.dtype = torch.float16,
    average: Mapping[str, Tensor] | None = None,
    step: int | None = None,
) -> Path:
    """Write the run's averaged weights as its stage's file in `weights`; returns the path.

    Args:
        dtype: of the numbers in the file, float16 or bfloat16.
        average: the weights, whole; None: the run's average, as it lies on one rank.
        step: that the weights are of; None: the state's.

    Raises:
        CheckpointError: rounded to it, the weights predict something else; what was published before stays.
    """
    state, preset = trainer.state, trainer.preset
    step = state.step if step is None else step
    average = average if average is not None else state.average
    held_out: dict[str, Any] = next((e for e in reversed(read_log(trainer.folder)) if e["kind"] == "held_out"), {})
    trained = {
        "preset": preset.name,
        "step": step,
        "examples": state.examples - (state.step - step) * preset.batch,
        "corpus_fingerprint": fingerprint,
        "rounding_error": check_parity(preset.unet, average, dtype),
        "held_out_loss": {k: v for k, v in held_out.items() if isinstance(v, float) and k != "time"},
    }
    return publish_stage(weights, preset.stage, preset.unet, average, trained, dtype=dtype)
