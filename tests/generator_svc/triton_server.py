"""A real tritonserver over tiny U-Nets, and a bare client of it: named tensors in, responses out."""

from __future__ import annotations

import queue
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from deploy.local.tritonserver import ADMIN_HEADER, TritonServer, TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from generator_svc.stage_tensors import (
    NUMPY_TYPES,
    StageRequest,
    StageResponse,
    pack_request,
    unpack_error,
    unpack_response,
)

TIMEOUT_S = 60.0
_TYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}


@pytest.fixture(scope="session")
def triton_repository(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the tiny weights."""
    folder = tmp_path_factory.mktemp("repository")
    export(ExportSettings(weights=weights, repository=folder, threads=1, batches="1,4"))
    return folder


@pytest.fixture(scope="session")
def triton_server(triton_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A tritonserver that serves it; for tests that leave it as it is."""
    log = tmp_path_factory.mktemp("triton") / "tritonserver.log"
    with running_triton(TritonSettings(repository=triton_repository, log=log)) as server:
        yield server


def inputs_of(tensors: dict[str, np.ndarray]) -> list[triton.InferInput]:
    """Tensors as a request carries them."""
    made = []
    for name, array in tensors.items():
        made.append(triton.InferInput(name, list(array.shape), _TYPES[array.dtype]))
        made[-1].set_data_from_numpy(array)
    return made


class Stream:
    """A stream to one server, over which several requests may live."""

    def __init__(self, address: str) -> None:
        """Open it."""
        self._client = triton.InferenceServerClient(address)
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def send(
        self, model: str, request: StageRequest | dict[str, np.ndarray], *, name: str = "", **options: Any
    ) -> None:
        """Send a request; its responses bear `name`."""
        tensors = request if isinstance(request, dict) else pack_request(request)
        self._client.async_stream_infer(model, inputs_of(tensors), request_id=name, **options)

    def receive(self, timeout_s: float = TIMEOUT_S) -> tuple[str, StageResponse]:
        """The next response, and whose it is.

        Raises:
            ServiceError: a stage said so.
            InferenceServerException: Triton itself did.
        """
        result, error = self._answers.get(timeout=timeout_s)
        if error is not None:
            raise unpack_error(error.message()) or error
        response = result.get_response()
        names = [output.name for output in response.outputs]
        return response.id, unpack_response({name: result.as_numpy(name) for name in names})

    def finish(self, names: set[str]) -> dict[str, list[StageResponse]]:
        """All responses of these requests, to the last of each."""
        said: dict[str, list[StageResponse]] = {name: [] for name in names}
        while not all(responses and responses[-1].model for responses in said.values()):
            name, response = self.receive()
            said[name].append(response)
        return said

    def cancel(self) -> None:
        """Break off: what lives is cancelled."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


@contextmanager
def stream(server: TritonServer) -> Iterator[Stream]:
    """A stream for as long as the block lasts."""
    opened = Stream(server.address)
    try:
        yield opened
    finally:
        opened.cancel()


class Admin:
    """What the admin key allows."""

    def __init__(self, server: TritonServer) -> None:
        self._client = triton.InferenceServerClient(server.address)
        self._headers = {ADMIN_HEADER: server.admin_key}

    def load(self, model: str) -> str:
        """Ask for a model's newest version; gives the error, or nothing."""
        try:
            self._client.load_model(model, headers=self._headers, client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            return str(error.message())
        return ""

    def is_ready(self, model: str, version: str = "") -> bool:
        """Whether this version, or any, is served."""
        return self._client.is_model_ready(model, version)

    def statistics(self, model: str) -> Any:
        """Triton's own counters of a model."""
        said = self._client.get_inference_statistics(model, headers=self._headers)
        return said.model_stats[0]  # pyright: ignore[reportAttributeAccessIssue]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what comes true by itself."""
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up, "it does not come true"
        time.sleep(0.05)


def figure(server: TritonServer, name: str, model: str) -> float:
    """A metric of a model; the model tells them a few times a second."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=TIMEOUT_S) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name}{{") and f'model="{model}"' in line:
                return float(line.rsplit(" ", 1)[1])
    raise KeyError(name)
