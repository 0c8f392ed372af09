"""What Triton's Python backend runs for a U-Net: `stage_sequences.py` behind its requests and responses."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]

from common.service.errors import InvalidArgument, ServiceError
from generator_svc.orphan_watch import end_with_server
from generator_svc.served_stage import StageParameters, open_stage
from generator_svc.stage_sequences import Turn
from generator_svc.stage_tensors import StageResponse, pack_error, pack_response, unpack_request

SWEEP_S = 0.25  # how long the state of a cancelled request may outlive it where no other request comes; half a beat
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One stage."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights strictly and run every batch size once; an error keeps this version from becoming ready."""
        end_with_server()
        logging.basicConfig(level=logging.INFO, format=f"{args['model_name']} %(levelname)s %(name)s %(message)s")
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        self._metrics = _Metrics(args["model_name"], args["model_version"])
        self._sequences, self._engine = open_stage(
            folder,
            args["model_version"],
            StageParameters.from_json(given),
            device=device,
            on_batch=self._metrics.on_batch,
        )
        self._is_closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Give these requests their turn."""
        again = self._sequences.execute([_turn(request) for request in requests])
        for request, comes_again in zip(requests, again, strict=True):
            if comes_again:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)

    def finalize(self) -> None:
        """End the sweeping thread; where Triton is gone it may hang in a question to it, and is left behind."""
        self._is_closing.set()
        self._sweeper.join(SWEEP_S)

    def _sweep(self) -> None:
        while not self._is_closing.wait(SWEEP_S):
            if self._sequences.num_live:
                self._sequences.beat()
                self._sequences.sweep()
            self._metrics.flush(self._sequences.num_live, self._engine.room.taken)


def _turn(request: Any) -> Turn:
    sender = request.get_response_sender()
    timeout_us = request.timeout()
    return Turn(
        sequence=request.correlation_id(),
        name=request.request_id(),
        is_start=bool(request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
        read=lambda: unpack_request({tensor.name(): _array(tensor) for tensor in request.inputs()}),
        is_cancelled=sender.is_cancelled,
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        send=partial(_send, sender),
        send_error=partial(_send_error, sender),
    )


def _array(tensor: Any) -> np.ndarray:
    # `as_numpy` reads wrong bytes under NumPy 2. The memory is Triton's until the execution ends: a copy outlives it.
    return torch.from_dlpack(tensor).cpu().numpy().copy()


def _send(sender: Any, response: StageResponse, is_last: bool) -> None:
    tensors = [
        pb_utils.Tensor.from_dlpack(name, torch.from_numpy(np.require(array, requirements=["C", "W"])))
        for name, array in pack_response(response).items()
    ]
    sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=FINAL if is_last else 0)


def _send_error(sender: Any, error: ServiceError) -> None:
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, InvalidArgument) else pb_utils.TritonError.UNAVAILABLE
    said = pb_utils.TritonError(pack_error(error), code)
    sender.send(pb_utils.InferenceResponse(error=said), flags=FINAL)


class _Metrics:
    """What Triton's own counters cannot say: they count requests in executions, not trajectories in passes.

    Triton is told now and then, not at every step: it is another process, and the interpreter stands while it answers.
    """

    def __init__(self, model: str, version: str) -> None:
        self._metrics: dict[str, Any] = {}
        self._told: dict[str, float] = {}
        self._passes, self._steps, self._seconds = 0, 0, 0.0
        counter, gauge = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE
        self._families = []
        for name, described, kind in (
            ("reimagen_stage_passes_total", "Passes of the network.", counter),
            ("reimagen_stage_trajectory_steps_total", "Steps of trajectories; over passes: the mean batch.", counter),
            ("reimagen_stage_pass_seconds_total", "Time in passes.", counter),
            ("reimagen_stage_live_requests", "Requests whose state is kept.", gauge),
            ("reimagen_stage_live_bytes", "Bytes that they keep.", gauge),
        ):
            family = pb_utils.MetricFamily(name=name, description=described, kind=kind)
            self._families.append(family)
            self._metrics[name] = family.Metric(labels={"model": model, "version": version})

    def on_batch(self, trajectories: int, seconds: float) -> None:
        self._passes += 1
        self._steps += trajectories
        self._seconds += seconds

    def flush(self, requests: int, live_bytes: int) -> None:
        """Tell what has changed; counters first, so that a gauge at zero says that they are whole."""
        for name, value in (
            ("reimagen_stage_passes_total", self._passes),
            ("reimagen_stage_trajectory_steps_total", self._steps),
            ("reimagen_stage_pass_seconds_total", self._seconds),
            ("reimagen_stage_live_requests", requests),
            ("reimagen_stage_live_bytes", live_bytes),
        ):
            if (before := self._told.get(name, 0.0)) == value:
                continue
            metric = self._metrics[name]
            metric.increment(value - before) if name.endswith("_total") else metric.set(value)
            self._told[name] = value
