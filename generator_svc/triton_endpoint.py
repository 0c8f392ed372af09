"""One Triton, as far as one model goes, and how it is watched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc

from generator_svc.triton_client import TritonClient

T = TypeVar("T")
Canary = Callable[[TritonClient, float], Awaitable[T]]
"""Has the model answered, within so many seconds; gives what it says of itself."""


@dataclass(frozen=True, kw_only=True)
class EndpointPolicy:
    """How endpoints are watched.

    Attributes:
        canary_interval_s: between canaries, where nothing else is heard of an endpoint.
        canary_timeout_s: in which either the canary is answered or Triton itself answers.
        answer_s: what a canary may take at a Triton that answers: that a stub is gone takes it a second to find out.
        silence_s: how long nothing may come from a model that answers a request in parts, while its Triton lives.
        stall_s: how long nothing may come from another at most: canaries stand behind the step under way for another's
            request, which may be a long one. Between the two the model decides, see `Endpoints`.
        min_backoff_s, max_backoff_s: from an ejection to the next canary, doubled each time; each is shortened by up
            to a half at random, so that many generators do not ask at once.
        resolve_interval_s: between look-ups of names.
        patience_s: how long a request without a deadline waits for an endpoint.
    """

    canary_interval_s: float = 1.0
    canary_timeout_s: float = 1.25
    answer_s: float = 3.0
    silence_s: float = 3.5
    stall_s: float = 30.0
    min_backoff_s: float = 0.25
    max_backoff_s: float = 3.0
    resolve_interval_s: float = 5.0
    patience_s: float = 60.0


@dataclass(kw_only=True, eq=False)
class Endpoint(Generic[T]):
    """One Triton, as far as one model goes.

    Attributes:
        told: what the model last said of itself, at a canary or with a picture; None before the first.
        is_in: whether it is chosen.
        suspicion: failures since the last success, see `_EJECTED_AT`.
        ejections: ejections, and canaries that failed since, without a request's success between them.
        fault: why it is out of use, as it was last told.
        refused: the credentials that it did not take while it was in use with others.
        heard_at: time.monotonic() of its last answer or part of one.
        speaking: requests that have been answered in part: the model shows twice a second that it lives.
        requests: who has one under way, and what is set when it is over.
    """

    client: TritonClient
    told: T | None = None
    is_in: bool = False
    in_flight: int = 0
    suspicion: int = 0
    ejections: int = 0
    fault: str = ""
    refused: grpc.ChannelCredentials | None = None
    heard_at: float = float("-inf")
    speaking: int = 0
    requests: dict[asyncio.Task[object], asyncio.Event] = field(default_factory=dict)
    abandoned: set[asyncio.Task[object]] = field(default_factory=set)
    doubted: asyncio.Event = field(default_factory=asyncio.Event)
    watch: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self.client.address

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Callable[[], None]]:
        """While an answer comes in parts: gives what is to be called with each of them."""
        is_first = True

        def heard() -> None:
            nonlocal is_first
            self.heard_at = time.monotonic()
            self.speaking += is_first
            is_first = False

        try:
            yield heard
        finally:
            self.speaking -= not is_first
