"""Closed-loop load on a retrieval service: so many callers, each asking again as soon as it is answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from bench.synthetic import Question

DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Answers per second, and how long they took in milliseconds."""

    qps: float
    p50_ms: float
    p99_ms: float
    answers: int


def request_of(question: Question, method: pb.Method, knowledge_base: str, k: int) -> pb.RetrieveRequest:
    """The lookup as BM25 (words), CLIP (vector) or HYBRID (both)."""
    request = pb.RetrieveRequest(knowledge_base=knowledge_base, method=method, k=k, omit_images=True)
    if method != pb.METHOD_CLIP:
        request.prompt = question.words
    if method != pb.METHOD_BM25:
        request.query_embedding.extend(question.embedding.tolist())
        request.query_weights.embedding = 1.0
    return request


def measure(address: str, requests: Sequence[pb.RetrieveRequest], *, callers: int, seconds: float) -> Measured:
    """Ask `requests` in turn for `seconds`, after a second to warm up.

    Raises:
        grpc.aio.AioRpcError: a lookup failed.
    """
    return asyncio.run(_measure(address, requests, callers, seconds))


async def _measure(address: str, requests: Sequence[pb.RetrieveRequest], callers: int, seconds: float) -> Measured:
    took: list[float] = []
    turn = itertools.cycle(requests)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.RetrievalServiceStub(channel)

        async def call(until: float, keep: bool) -> None:
            while (started := time.perf_counter()) < until:
                await stub.Retrieve(next(turn), timeout=DEADLINE_S, wait_for_ready=True)
                if keep:
                    took.append(time.perf_counter() - started)

        for duration, keep in ((min(1.0, seconds), False), (seconds, True)):
            started = time.perf_counter()
            await asyncio.gather(*(call(started + duration, keep) for _ in range(callers)))
            elapsed = time.perf_counter() - started
    milliseconds = np.array(took) * 1e3
    return Measured(
        qps=round(len(took) / elapsed, 1),
        p50_ms=round(float(np.percentile(milliseconds, 50)), 2),
        p99_ms=round(float(np.percentile(milliseconds, 99)), 2),
        answers=len(took),
    )
