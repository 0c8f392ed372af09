"""Closed-loop load on a retrieval service: so many callers, each asking again as soon as it is answered.

The callers share the machine with the service. To cost it little they send requests that were serialized beforehand and
leave the answers as bytes, but for a few that are checked; what they and the service take of the processors is reported.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import numpy as np
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from bench.synthetic import Question

DEADLINE_S = 60.0
CHECKED_ANSWERS = 100
_RETRIEVE = "/reimagen.retrieval.v1.RetrievalService/Retrieve"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Answers per second, how long they took, and the processor time of one answer: the service's, and the callers'."""

    callers: int
    qps: float
    p50_ms: float
    p99_ms: float
    answers: int
    service_cpu_ms: float
    callers_cpu_ms: float


def request_of(question: Question, method: pb.Method, knowledge_base: str, k: int) -> bytes:
    """The lookup as BM25 (words), CLIP (vector) or HYBRID (both), serialized."""
    request = pb.RetrieveRequest(knowledge_base=knowledge_base, method=method, k=k, omit_images=True)
    if method != pb.METHOD_CLIP:
        request.prompt = question.words
    if method != pb.METHOD_BM25:
        request.query_embedding.extend(question.embedding.tolist())
        request.query_weights.embedding = 1.0
    return request.SerializeToString()


def measure(
    address: str, requests: Sequence[bytes], *, callers: int, seconds: float, service_pid: int, k: int
) -> Measured:
    """Ask `requests` in turn for `seconds`, after a second to warm up.

    Raises:
        grpc.aio.AioRpcError: a lookup failed.
        ValueError: an answer has other than `k` neighbors without a reason, or a leg did not answer.
    """
    return asyncio.run(_measure(address, requests, callers, seconds, service_pid, k))


async def _measure(
    address: str, requests: Sequence[bytes], callers: int, seconds: float, service_pid: int, k: int
) -> Measured:
    took: list[float] = []
    checked: list[bytes] = []
    turn = itertools.cycle(requests)
    async with grpc.aio.insecure_channel(address) as channel:
        retrieve = channel.unary_unary(_RETRIEVE)

        async def call(until: float, keep: bool) -> None:
            while (started := time.perf_counter()) < until:
                answer = await retrieve(next(turn), timeout=DEADLINE_S, wait_for_ready=True)
                if keep:
                    took.append(time.perf_counter() - started)
                elif len(checked) < CHECKED_ANSWERS:
                    checked.append(answer)

        await asyncio.gather(*(call(time.perf_counter() + min(1.0, seconds), False) for _ in range(callers)))
        for answer in checked:
            _check(pb.RetrieveResponse.FromString(answer), k)
        service_s, callers_s, started = processor_s(service_pid), time.process_time(), time.perf_counter()
        await asyncio.gather(*(call(started + seconds, True) for _ in range(callers)))
        elapsed = time.perf_counter() - started
        service_s, callers_s = processor_s(service_pid) - service_s, time.process_time() - callers_s
    milliseconds = np.array(took) * 1e3
    return Measured(
        callers=callers,
        qps=round(len(took) / elapsed, 1),
        p50_ms=round(float(np.percentile(milliseconds, 50)), 2),
        p99_ms=round(float(np.percentile(milliseconds, 99)), 2),
        answers=len(took),
        service_cpu_ms=round(service_s / len(took) * 1e3, 3),
        callers_cpu_ms=round(callers_s / len(took) * 1e3, 3),
    )


def _check(answer: pb.RetrieveResponse, k: int) -> None:
    if (len(answer.neighbors) != k and not answer.shortfall_reason) or not answer.neighbors or answer.failed_legs:
        raise ValueError(
            f"an answer has {len(answer.neighbors)} of {k} neighbors; legs that failed: {answer.failed_legs}"
        )


def processes_of(pid: int) -> list[int]:
    """A process and those that it has started and that run, as proc(5) tells."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    return [pid, *(one for child in children for one in processes_of(child))]


def processor_s(service_pid: int) -> float:
    """Processor seconds of a service so far, its own and the kernel's for it: fields 14 and 15 of proc(5)'s stat."""
    ticks = 0
    for pid in processes_of(service_pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S
