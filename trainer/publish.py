"""From a run's state to the weights that a server loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.checkpoint import publish_stage
from trainer.fit import Trainer
from trainer.look import read_log
from trainer.parity import check_parity


def publish(trainer: Trainer, weights: Path, fingerprint: str, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write the run's averaged weights as its stage's file in `weights`; returns the path.

    Args:
        dtype: of the numbers in the file, float16 or bfloat16.

    Raises:
        CheckpointError: rounded to it, the weights predict something else; what was published before stays.
    """
    state, preset = trainer.state, trainer.preset
    held_out: dict[str, Any] = next((e for e in reversed(read_log(trainer.folder)) if e["kind"] == "held_out"), {})
    trained = {
        "preset": preset.name,
        "step": state.step,
        "examples": state.examples,
        "corpus_fingerprint": fingerprint,
        "rounding_error": check_parity(preset.unet, state.average, dtype),
        "held_out_loss": {k: v for k, v in held_out.items() if isinstance(v, float) and k != "time"},
    }
    return publish_stage(weights, preset.stage, preset.unet, state.average, trained, dtype=dtype)
