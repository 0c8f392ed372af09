"""From a run's state to the weights that a server loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checkpoint import publish_stage
from common.unet.config import UNetConfig
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
    replace: bool = False,
) -> Path:
    """Write the run's averaged weights as its stage's file in `weights`; returns the path.

    Args:
        dtype: of the numbers in the file, float16 or bfloat16.
        average: the weights, whole; None: the run's average, as it lies on one rank.
        step: that the weights are of; None: the state's.
        replace: also where weights that saw more examples are published there.

    Raises:
        ValueError: such weights are there, and may not be replaced; they stay.
        CheckpointError: rounded to it, the weights predict something else; what was published before stays.
    """
    state, preset = trainer.state, trainer.preset
    step = state.step if step is None else step
    average = average if average is not None else state.average
    examples = state.examples - (state.step - step) * preset.batch
    if not replace:
        check_replaced(weights, preset.stage, examples, preset.unet)
    held_out: dict[str, Any] = next((e for e in reversed(read_log(trainer.folder)) if e["kind"] == "held_out"), {})
    trained = {
        "preset": preset.name,
        "step": step,
        "examples": examples,
        "corpus_fingerprint": fingerprint,
        "rounding_error": check_parity(preset.unet, average, dtype),
        "held_out_loss": {k: v for k, v in held_out.items() if isinstance(v, float) and k != "time"},
    }
    return publish_stage(weights, preset.stage, preset.unet, average, trained, dtype=dtype)


def check_replaced(weights: Path, size: int, examples: int, unet: UNetConfig) -> None:
    """Refuse to put weights of `unet` that saw `examples` in the place of published ones that saw more.

    Raises:
        ValueError: they did; the message names what differs where they are of another architecture.
    """
    there, _ = published(weights, size)
    if there <= examples:
        return
    strange = differences(weights, size, unet)
    raise ValueError(
        f"--weights: {weights} holds a unet_{size} that saw {there:,} examples, and this one {examples:,}: "
        "publish to another folder, or say --replace"
        + (f" (they are of another architecture: {'; '.join(strange)})" if strange else "")
    )


def published(weights: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Examples that a folder's stage saw, and its architecture; 0 where there is none, or what is there does not say."""
    path = weights / f"unet_{size}.safetensors"
    if not path.is_file():
        return 0, {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return int(json.loads(header["trained"])["examples"]), dict(json.loads(header.get("unet", "{}")))
    except (SafetensorError, KeyError, TypeError, ValueError):
        return 0, {}


def differences(weights: Path, size: int, unet: UNetConfig) -> list[str]:
    """What of a published stage's architecture is not as in `unet`: names, with both values; none where there is no stage."""
    _, architecture = published(weights, size)
    with suppress(ValueError, KeyError, TypeError):  # as it reads now what was written before some names were there
        architecture = UNetConfig.from_json(architecture).to_json()
    theirs, ours = (json.loads(json.dumps(each)) for each in (architecture, unet.to_json()))
    return [
        f"{name} is {theirs.get(name, 'missing')} there and {ours.get(name, 'unknown')} here"
        for name in sorted({*theirs, *ours})
        if theirs and theirs.get(name) != ours.get(name)
    ]
