"""The generator over gRPC: its process, its requests, one of them against the bare loop, bytes on the wire."""

from __future__ import annotations

import asyncio
import io
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from PIL import Image as Pictures
from reimagen.generator.v1 import generator_pb2 as pb

from bench.serving_network import BASE_STEPS
from common.stages import STAGES

_GENERATE_IMAGES = "/reimagen.generator.v1.GeneratorService/GenerateImages"
PROMPT = "a guide dog, noto style, on a blue background"
PEAK_DEADLINE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A generator process: where it is asked, where Prometheus reads it, its process id."""

    address: str
    metrics_url: str
    pid: int


@contextmanager
def generator(folder: Path, *flags: str) -> Iterator[Served]:
    """A generator process."""
    address, metrics_port = f"unix:{folder}/generator.sock", _free_port()
    command = [sys.executable, "-m", "generator_svc", "serve", f"--address={address}", "--log-level=warning"]
    command.append(f"--metrics-port={metrics_port}")
    # Nothing here asks retrieval: requests bring their own references.
    command += [f"--retrieval-address=unix:{folder}/nobody.sock", *flags]
    with (folder / "generator.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert child.stdout is not None
            if not child.stdout.readline().startswith("ready"):
                raise RuntimeError(f"no generator: {(folder / 'generator.log').read_text()[-500:]}")
            yield Served(address=address, metrics_url=f"http://127.0.0.1:{metrics_port}/metrics", pid=child.pid)
        finally:
            child.terminate()
            child.wait(60)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def request_of(*, stop_at: int, seed: int, references: int = 2) -> bytes:
    """A request of `BASE_STEPS` with the caller's own pairs, serialized."""
    source = np.random.default_rng(seed)
    pairs = []
    for number in range(references):
        picture = io.BytesIO()
        pixels = np.kron(source.integers(0, 256, (8, 8, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
        Pictures.fromarray(pixels).save(picture, "PNG")
        pairs.append(pb.Reference(image=picture.getvalue(), caption=f"a guide dog, drawing {number}"))
    steps = [pb.StageOverrides(stage=STAGES[0].size, steps=BASE_STEPS)]
    request = pb.GenerateRequest(prompt=PROMPT, seed=seed, stop_at=stop_at, references=pairs, stages=steps)
    return pb.GenerateImagesRequest(request=request).SerializeToString()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one call ended, after how long, when (on the load's clock), how large its answer was, and what an error said."""

    code: str
    seconds: float
    response_bytes: int = 0
    ended_s: float = 0.0
    said: str = ""


async def ask(channel: grpc.aio.Channel, request: bytes, *, deadline_s: float) -> Outcome:
    """One call; its answer stays bytes."""
    call = channel.unary_unary(_GENERATE_IMAGES)
    started = time.perf_counter()
    try:
        answer = await call(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        return Outcome(code=error.code().name, seconds=time.perf_counter() - started, said=error.details() or "")
    return Outcome(code="OK", seconds=time.perf_counter() - started, response_bytes=len(answer))


def overhead(address: str, bare: Callable[[], object], *, stop_at: int, repeats: int) -> dict[str, Any]:
    """One request through the service, in turns with the same work done by a bare loop in this process.

    The ratio is of the least times: what else the machine does only adds to them.
    """
    asked, looped = [], []
    request = request_of(stop_at=stop_at, seed=3)

    async def once() -> Outcome:
        async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            await channel.channel_ready()
            return await ask(channel, request, deadline_s=PEAK_DEADLINE_S)

    for repeat in range(repeats + 2):
        outcome = asyncio.run(once())
        if outcome.code != "OK":
            raise RuntimeError(f"the service answered {outcome.code}")
        started = time.perf_counter()
        bare()
        if repeat >= 2:  # the first ones warm up
            looped.append(time.perf_counter() - started)
            asked.append(outcome.seconds)
    return {
        "overhead_ratio": round(min(asked) / min(looped), 4),
        "overhead_ratio_of_medians": round(float(np.median(asked) / np.median(looped)), 4),
        "service_s": round(min(asked), 3),
        "bare_loop_s": round(min(looped), 3),
        "request_bytes": len(request),
        "response_bytes": outcome.response_bytes,
        "repeats": repeats,
    }
