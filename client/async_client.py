"""`client` for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from client.async_connection import AsyncConnection
from client.async_knowledge_base import AsyncKnowledgeBases
from client.async_trainer import AsyncTrainerClient
from client.channel import Tls
from client.client import TIMEOUT_S
from client.generation_messages import GenerationFailed, events_call, images_call, models_call
from client.generation_result import Collected, asked
from client.generation_types import Event, Generation, GenerationRequest, Models
from client.generator import MODELS_TIMEOUT_S, SERVICES
from client.health import ServiceHealth
from client.retry import RetryPolicy


class AsyncClient:
    """A generator, the retrieval service beside it, and a trainer, for the event loop in which it is made; see `Client`."""

    def __init__(
        self,
        generator: str = "",
        *,
        retrieval: str = "",
        trainer: str = "",
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """See `Client`."""
        policy = retry or RetryPolicy()
        self._generator = (
            AsyncConnection(generator, api_key=api_key, tls=tls, retry=policy, failure=GenerationFailed)
            if generator
            else None
        )
        self._bases = AsyncKnowledgeBases(retrieval, api_key=api_key, tls=tls, retry=policy) if retrieval else None
        self._trainer = AsyncTrainerClient(trainer, api_key=api_key, tls=tls, retry=policy) if trainer else None
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        for part in (self._generator, self._bases, self._trainer):
            if part is not None:
                await part.close()

    @property
    def knowledge_bases(self) -> AsyncKnowledgeBases:
        """What pictures are looked up in."""
        if self._bases is None:
            raise ValueError("retrieval: the client was given no address of it")
        return self._bases

    @property
    def trainer(self) -> AsyncTrainerClient:
        """What trains."""
        if self._trainer is None:
            raise ValueError("trainer: the client was given no address of it")
        return self._trainer

    async def generate(
        self,
        what: str | GenerationRequest,
        *,
        on_event: Callable[[Event], object] | None = None,
        timeout_s: float | None = None,
        **knobs: Any,
    ) -> Generation:
        """Draw, and wait for the result; see `Client.generate`. Cancelling the task cancels the call."""
        collected = Collected()
        async with aclosing(self.events(what, timeout_s=timeout_s, **knobs)) as events:
            async for event in events:
                collected.add(event)
                if on_event is not None:
                    on_event(event)
        return collected.generation()

    def events(
        self, what: str | GenerationRequest, *, timeout_s: float | None = None, **knobs: Any
    ) -> AsyncGenerator[Event, None]:
        """Draw, and yield what happens. Closing the generator (`contextlib.aclosing`) cancels the call."""
        call = events_call(asked(what, knobs))
        return self._drawing().stream(call, timeout_s=self._deadline_s(timeout_s))

    async def generate_images(
        self, what: str | GenerationRequest, *, timeout_s: float | None = None, **knobs: Any
    ) -> Generation:
        """Draw by one call with one answer; see `Client.generate_images`."""
        call = images_call(asked(what, knobs))
        return await self._drawing().ask(call, timeout_s=self._deadline_s(timeout_s))

    async def models(self) -> Models:
        """What the generator draws with."""
        return await self._drawing().ask(models_call(), timeout_s=MODELS_TIMEOUT_S)

    async def health(self) -> tuple[ServiceHealth, ...]:
        """Whether each service answers; never fails."""
        found = await self._generator.health(SERVICES) if self._generator is not None else ()
        found += await self._bases.health() if self._bases is not None else ()
        return found + (await self._trainer.health() if self._trainer is not None else ())

    def _drawing(self) -> AsyncConnection:
        if self._generator is None:
            raise ValueError("generator: the client was given no address of it")
        return self._generator

    def _deadline_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s
