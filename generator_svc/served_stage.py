"""A stage as a model repository holds it: opened strictly, warmed up, ready for its first request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from common.checkpoint import CheckpointError, StageWeights, load_stage
from common.stages import StageSpec, stage
from common.unet.packed import packed
from generator_svc.compiled_unet import COMPILERS, Compiler, compiled
from generator_svc.stage_engine import OnBatch, StageEngine
from generator_svc.stage_sequences import Sequences
from generator_svc.stage_tensors import ModelCard

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """How a stage is served; travels as the `parameters` of config.pbtxt. The device is that of the instance group.

    Attributes:
        size: side of its pictures.
        dtype: of the network's numbers.
        max_batch: trajectories that share one pass.
        batches: batch sizes that are run before the stage is ready; where it is compiled, passes are padded to them.
        max_live_bytes: bound on what its requests may keep.
        idle_s: seconds without a turn after which a request's state is let go.
        threads: CPU threads of a pass; 0: one for each core.
        compiler: none, inductor, or graphs (CUDA graphs).
    """

    size: int
    dtype: Dtype
    max_batch: int
    batches: tuple[int, ...]
    max_live_bytes: int
    idle_s: float
    threads: int
    compiler: Compiler

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_live_bytes", "idle_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.compiler not in COMPILERS:
            raise ValueError(f"compiler: {self.compiler!r} is not one of {', '.join(COMPILERS)}")
        if self.threads < 0:
            raise ValueError(f"threads: {self.threads} is negative")
        if list(self.batches) != sorted(set(self.batches)) or not all(1 <= b <= self.max_batch for b in self.batches):
            raise ValueError(
                f"batches: {list(self.batches)} do not ascend from 1 to max_batch {self.max_batch} at most"
            )
        if self.compiler != "none" and (not self.batches or self.batches[-1] != self.max_batch):
            raise ValueError(
                f"batches: {list(self.batches)} do not end with max_batch {self.max_batch}: passes are padded"
            )

    def to_json(self) -> dict[str, str]:
        """As text, by name."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in said.items()}

    @classmethod
    def from_json(cls, given: Mapping[str, str]) -> StageParameters:
        """Inverse of `to_json`.

        Raises:
            ValueError: a name is missing or unknown, or its value cannot be.
        """
        known = {each.name for each in fields(cls)}
        if set(given) != known:
            raise ValueError(f"parameters: {sorted(set(given) ^ known)} are unknown or missing")
        return cls(
            size=int(given["size"]),
            dtype=given["dtype"],  # type: ignore[arg-type]
            max_batch=int(given["max_batch"]),
            batches=parse_batches(given["batches"]),
            max_live_bytes=int(given["max_live_bytes"]),
            idle_s=float(given["idle_s"]),
            threads=int(given["threads"]),
            compiler=given["compiler"],  # type: ignore[arg-type]
        )


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes of "1,2,4".

    Raises:
        ValueError: one is no whole number.
    """
    return tuple(int(part) for part in text.split(",") if part.strip())


def load_weights(
    folder: Path, spec: StageSpec, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> StageWeights:
    """A stage's weights, loaded strictly.

    Raises:
        CheckpointError: they are missing, altered, or of another kind than the stage.
    """
    weights = load_stage(folder, spec.size, device=device, dtype=dtype)
    if (scale := weights.unet.config.scale) != spec.scale:
        raise CheckpointError(
            f"weights: {folder / spec.name}.safetensors enlarge {scale} times; stage {spec.size} needs {spec.scale}"
        )
    return weights


def open_stage(
    folder: Path, version: str, parameters: StageParameters, *, device: str, on_batch: OnBatch
) -> tuple[Sequences, StageEngine]:
    """Load a version's weights and warm them up.

    Args:
        folder: of the version: weights and manifest.

    Raises:
        CheckpointError: the weights are missing, altered, or not this stage's.
        ValueError: a pass gave numbers that are not finite.
    """
    if parameters.threads:
        torch.set_num_threads(parameters.threads)
    spec = stage(parameters.size)
    weights = load_weights(folder, spec, device=device, dtype=DTYPES[parameters.dtype])
    is_compiled = parameters.compiler != "none"
    unet = compiled(weights.unet, parameters.compiler, parameters.batches) if is_compiled else packed(weights.unet)
    engine = StageEngine(
        spec,
        unet,
        max_batch=parameters.max_batch,
        max_live_bytes=parameters.max_live_bytes,
        on_batch=on_batch,
        encodes_in_steps=not is_compiled,
    )
    engine.warm_up(parameters.batches)
    card = ModelCard(
        stage=spec.size,
        unet=weights.unet.config,
        sha256=weights.sha256,
        version=version,
        parameters=sum(parameter.numel() for parameter in weights.unet.parameters()),
        trained=weights.trained,
        max_live_bytes=parameters.max_live_bytes,
        element_bytes=weights.unet.dtype.itemsize,
        pass_s=engine.full_pass_s,
    )
    return Sequences(engine, card, idle_s=parameters.idle_s), engine
