"""What Triton's Python backend runs for the text encoder: the texts of all waiting requests in one pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from common.service.errors import InvalidArgument
from generator_svc.orphan_watch import end_with_server
from generator_svc.served_texts import ServedTexts
from generator_svc.stage_tensors import pack_encoded, pack_error, unpack_texts


class TritonPythonModel:
    """The frozen text encoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load it and encode once; an error keeps this version from becoming ready."""
        end_with_server()
        parameters = json.loads(args["model_config"])["parameters"]
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        folder = Path(args["model_repository"]) / args["model_version"]
        self._texts = ServedTexts(folder, device=device, threads=int(parameters["threads"]["string_value"]))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Encode them all together."""
        responses: dict[int, Any] = {}
        wanted: dict[int, list[str]] = {}
        for i, request in enumerate(requests):
            try:
                wanted[i] = unpack_texts({tensor.name(): _array(tensor) for tensor in request.inputs()})
            except InvalidArgument as error:
                said = pb_utils.TritonError(pack_error(error), pb_utils.TritonError.INVALID_ARG)
                responses[i] = pb_utils.InferenceResponse(error=said)
        for i, encoded in zip(wanted, self._texts.encode(list(wanted.values())), strict=True):
            tensors = [
                pb_utils.Tensor.from_dlpack(name, torch.from_numpy(array))
                for name, array in pack_encoded(encoded).items()
            ]
            responses[i] = pb_utils.InferenceResponse(output_tensors=tensors)
        return [responses[i] for i in range(len(requests))]


def _array(tensor: Any) -> Any:
    # `as_numpy` reads wrong bytes under NumPy 2.
    return torch.from_dlpack(tensor).cpu().numpy().copy()
