"""Load on the generator over gRPC: one request against the bare loop, bytes on the wire, ten times more than it can do."""

from __future__ import annotations

import asyncio
import collections
import io
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from PIL import Image as Pictures
from reimagen.generator.v1 import generator_pb2 as pb

_GENERATE_IMAGES = "/reimagen.generator.v1.GeneratorService/GenerateImages"
PROMPT = "a guide dog, noto style, on a blue background"
PEAK_DEADLINE_S = 600.0
OVERLOAD = 10


@contextmanager
def generator(folder: Path, *flags: str) -> Iterator[str]:
    """The address of a generator process."""
    address = f"unix:{folder}/generator.sock"
    command = [sys.executable, "-m", "generator_svc", "serve", f"--address={address}", "--log-level=warning"]
    # Nothing here asks retrieval: requests bring their own references.
    command += [f"--retrieval-address=unix:{folder}/nobody.sock", *flags]
    with (folder / "generator.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert child.stdout is not None
            if not child.stdout.readline().startswith("ready"):
                raise RuntimeError(f"no generator: {(folder / 'generator.log').read_text()[-500:]}")
            yield address
        finally:
            child.terminate()
            child.wait(60)


def request_of(*, stop_at: int, seed: int, references: int = 2) -> bytes:
    """A request with the caller's own pairs, serialized."""
    source = np.random.default_rng(seed)
    pairs = []
    for number in range(references):
        picture = io.BytesIO()
        pixels = np.kron(source.integers(0, 256, (8, 8, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
        Pictures.fromarray(pixels).save(picture, "PNG")
        pairs.append(pb.Reference(image=picture.getvalue(), caption=f"a guide dog, drawing {number}"))
    request = pb.GenerateRequest(prompt=PROMPT, seed=seed, stop_at=stop_at, references=pairs)
    return pb.GenerateImagesRequest(request=request).SerializeToString()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one call ended, after how long, when (on the load's clock), and how large its answer was."""

    code: str
    seconds: float
    response_bytes: int = 0
    ended_s: float = 0.0


async def ask(channel: grpc.aio.Channel, request: bytes, *, deadline_s: float) -> Outcome:
    """One call; its answer stays bytes."""
    call = channel.unary_unary(_GENERATE_IMAGES)
    started = time.perf_counter()
    try:
        answer = await call(request, timeout=deadline_s)
    except grpc.aio.AioRpcError as error:
        return Outcome(code=error.code().name, seconds=time.perf_counter() - started)
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


def overloaded(address: str, *, stop_at: int, callers: int, seconds: float) -> dict[str, Any]:
    """Goodput at its peak (closed loop), then under `OVERLOAD` times that many requests a second (open loop)."""
    return asyncio.run(_overloaded(address, stop_at, callers, seconds))


async def _overloaded(address: str, stop_at: int, callers: int, seconds: float) -> dict[str, Any]:
    requests = [request_of(stop_at=stop_at, seed=seed) for seed in range(32)]
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        await _closed(channel, requests, callers, seconds / 6)
        peak = await _closed(channel, requests, callers, seconds / 2)
        latencies = sorted(outcome.seconds for outcome in peak if outcome.code == "OK")
        peak_rate = len(latencies) / (seconds / 2)
        deadline_s = 3.0 * latencies[len(latencies) // 2]
        loaded = await _open(channel, requests, OVERLOAD * peak_rate, deadline_s + seconds, deadline_s)
    # Until the first deadlines have passed the line is still filling, and after the last arrival it runs dry.
    steady = [outcome for outcome in loaded if deadline_s <= outcome.ended_s <= deadline_s + seconds]
    good = [outcome.seconds for outcome in steady if outcome.code == "OK"]
    refused = sorted(outcome.seconds for outcome in steady if outcome.code != "OK" and outcome.seconds < deadline_s / 2)
    rate = len(good) / seconds
    return {
        "goodput_at_10x": round(rate / peak_rate, 4),
        "peak_per_s": round(peak_rate, 3),
        "peak_callers": callers,
        "overload_per_s": round(len(loaded) / (deadline_s + seconds), 2),
        "goodput_per_s": round(rate, 3),
        "deadline_s": round(deadline_s, 2),
        "ended": dict(collections.Counter(outcome.code for outcome in steady)),
        "ended_at_their_deadline": len(steady) - len(good) - len(refused),
        "refused_at_once_p50_ms": round(float(np.percentile(refused, 50)) * 1e3, 2) if refused else None,
        "refused_at_once_p99_ms": round(float(np.percentile(refused, 99)) * 1e3, 2) if refused else None,
        "accepted_p50_s": round(float(np.percentile(good, 50)), 2) if good else None,
        "accepted_p99_s": round(float(np.percentile(good, 99)), 2) if good else None,
    }


async def _closed(channel: grpc.aio.Channel, requests: list[bytes], callers: int, seconds: float) -> list[Outcome]:
    """Each caller asks again as soon as it is answered; what ends within the time."""
    ended: list[Outcome] = []
    until = time.perf_counter() + seconds

    async def call(number: int) -> None:
        while time.perf_counter() < until:
            outcome = await ask(channel, requests[number % len(requests)], deadline_s=PEAK_DEADLINE_S)
            number += callers
            if time.perf_counter() < until:
                ended.append(outcome)

    await asyncio.gather(*(call(number) for number in range(callers)))
    return ended


async def _open(
    channel: grpc.aio.Channel, requests: list[bytes], rate: float, seconds: float, deadline_s: float
) -> list[Outcome]:
    """Requests at random moments for so long, `rate` a second whatever becomes of them."""
    source, calls = random.Random(5), []
    started = time.perf_counter()
    at, number = 0.0, 0

    async def call(request: bytes) -> Outcome:
        outcome = await ask(channel, request, deadline_s=deadline_s)
        return replace(outcome, ended_s=time.perf_counter() - started)

    while at < seconds:
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - started)))
        calls.append(asyncio.create_task(call(requests[number % len(requests)])))
        number += 1
        at += source.expovariate(rate)
    return await asyncio.gather(*calls)
