"""`config.pbtxt` of the served models, derived from `StageSpec` and from the contract of `stage_tensors.py`.

Which version is served is added where a version is published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from common.stages import StageSpec
from generator_svc.served_stage import StageParameters
from generator_svc.stage_tensors import (
    TEXT_ENCODER,
    TEXT_INPUTS,
    TEXT_OUTPUTS,
    UNET_INPUTS,
    UNET_OUTPUTS,
    TensorKind,
)

MAX_TEXT_REQUESTS = 64  # requests whose texts share an execution
IDLE_MARGIN = 2.0  # the stage lets go first: what Triton says of an idle request is less clear


def stage_config(
    spec: StageSpec, parameters: StageParameters, *, device: str, max_requests: int, reads_neighbors: bool
) -> str:
    """The configuration of a stage.

    Args:
        device: cpu, cuda or cuda:N.
        max_requests: live requests; more wait in Triton's backlog.
        reads_neighbors: whether its network does.
    """
    sides = {"low_res": spec.low_res_size, "start": spec.size, "pictures": spec.size, "previews": spec.size}
    if reads_neighbors:  # those of no neighbors are anything: K is 0
        sides["neighbors"] = spec.size
    inputs = {name: _sized(name, kind, sides) for name, kind in UNET_INPUTS.items() if _is_read(name, spec)}
    outputs = {name: _sized(name, kind, sides) for name, kind in UNET_OUTPUTS.items()}
    idle_us = int(parameters.idle_s * IDLE_MARGIN * 1e6)
    scheduling = f"""sequence_batching {{
  iterative_sequence: true
  max_sequence_idle_microseconds: {idle_us}
  oldest {{
    max_candidate_sequences: {max_requests}
    max_queue_delay_microseconds: 0
  }}
}}
model_transaction_policy {{ decoupled: true }}"""
    return _config(spec.name, max_requests, inputs, outputs, scheduling, device, parameters.to_json())


def text_encoder_config(*, device: str, threads: int) -> str:
    """The configuration of the text encoder: whatever waits is encoded together."""
    scheduling = "dynamic_batching { max_queue_delay_microseconds: 0 }"
    parameters = {"threads": str(threads)}
    return _config(TEXT_ENCODER, MAX_TEXT_REQUESTS, TEXT_INPUTS, TEXT_OUTPUTS, scheduling, device, parameters)


def _is_read(name: str, spec: StageSpec) -> bool:
    return name != "low_res" or spec.low_res_size > 0


def _sized(name: str, kind: TensorKind, sides: Mapping[str, int]) -> TensorKind:
    """The kind with the side that the stage fixes, if any."""
    if name not in sides:
        return kind
    lead, side = kind.dims[0], sides[name]
    shape = (lead, 3, side, side) if kind.dims[1] == 3 else (lead, side, side, 3)
    return replace(kind, dims=shape)


def _config(
    name: str,
    max_batch: int,
    inputs: Mapping[str, TensorKind],
    outputs: Mapping[str, TensorKind],
    scheduling: str,
    device: str,
    parameters: Mapping[str, str],
) -> str:
    lines = [f"name: {json.dumps(name)}", 'backend: "python"', f"max_batch_size: {max_batch}"]
    for said, kinds in (("input", inputs), ("output", outputs)):
        for tensor, kind in kinds.items():
            parts = [f"name: {json.dumps(tensor)}", f"data_type: TYPE_{kind.data_type}", f"dims: {list(kind.dims)}"]
            if said == "input":
                parts += ["allow_ragged_batch: true"] + ["optional: true"] * kind.optional
            lines.append(f"{said} {{ {' '.join(parts)} }}")
    lines += [scheduling, _instances(device)]
    for key, value in parameters.items():
        lines.append(f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}")
    return "\n".join(lines) + "\n"


def _instances(device: str) -> str:
    if device == "cpu":
        return "instance_group { kind: KIND_CPU count: 1 }"
    _, _, index = device.partition(":")
    return f"instance_group {{ kind: KIND_GPU count: 1 gpus: [{int(index or 0)}] }}"
