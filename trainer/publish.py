"""From a run's state to the weights that a server loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.checkpoint import publish_stage
from trainer.fit import Trainer
from trainer.look import read_log


def publish(trainer: Trainer, weights: Path, fingerprint: str) -> Path:
    """Write the run's averaged weights as its stage's file in `weights`; returns the path."""
    state, preset = trainer.state, trainer.preset
    held_out: dict[str, Any] = next((e for e in reversed(read_log(trainer.folder)) if e["kind"] == "held_out"), {})
    trained = {
        "preset": preset.name,
        "step": state.step,
        "examples": state.examples,
        "corpus_fingerprint": fingerprint,
        "held_out_loss": {k: v for k, v in held_out.items() if isinstance(v, float) and k != "time"},
    }
    return publish_stage(weights, preset.stage, preset.unet, state.average, trained)
