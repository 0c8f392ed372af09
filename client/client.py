"""The product as one object: pictures, knowledge bases, models, training, health. `async_client` is the same for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from types import TracebackType
from typing import Any, Self

from client.channel import Tls
from client.generation_result import Collected, asked
from client.generation_types import Event, Generation, GenerationRequest, Models
from client.generator import GeneratorClient
from client.health import ServiceHealth
from client.knowledge_base import KnowledgeBases
from client.retry import RetryPolicy
from client.trainer import TrainerClient

TIMEOUT_S = 600.0


class Client:
    """A generator, the retrieval service beside it, and a trainer; safe to use from several threads.

    Failures are `GenerationFailed`, `RetrievalFailed` and `TrainingFailed`, all `ServiceFailed`. What may be repeated is
    tried again while a service is away and has not begun to answer.
    """

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
        """Connects at the first call; an address may be missing where it is not used.

        Args:
            generator: its address; see `client.channel.open_channel`.
            retrieval: the address of retrieval, for `knowledge_bases`.
            trainer: the address of the trainer, for `trainer`.
            api_key: shown to all.
            tls: whom to trust; None: the connections are in the clear.
            timeout_s: deadline of a drawing that is given none.
            retry: None: `RetryPolicy()`.
        """
        policy = retry or RetryPolicy()
        self._generator = GeneratorClient(generator, api_key=api_key, tls=tls, retry=policy) if generator else None
        self._bases = KnowledgeBases(retrieval, api_key=api_key, tls=tls, retry=policy) if retrieval else None
        self._trainer = TrainerClient(trainer, api_key=api_key, tls=tls, retry=policy) if trainer else None
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels; calls under way are cancelled."""
        for part in (self._generator, self._bases, self._trainer):
            if part is not None:
                part.close()

    @property
    def knowledge_bases(self) -> KnowledgeBases:
        """What pictures are looked up in."""
        if self._bases is None:
            raise ValueError("retrieval: the client was given no address of it")
        return self._bases

    @property
    def trainer(self) -> TrainerClient:
        """What trains."""
        if self._trainer is None:
            raise ValueError("trainer: the client was given no address of it")
        return self._trainer

    def generate(
        self,
        what: str | GenerationRequest,
        *,
        on_event: Callable[[Event], object] | None = None,
        timeout_s: float | None = None,
        **knobs: Any,
    ) -> Generation:
        """Draw, and wait for the result. An exception in the meantime, Ctrl-C too, cancels the call.

        Args:
            what: a prompt or a whole request.
            on_event: is told what happens on the way.
            timeout_s: deadline; None: that of the client.
            knobs: further fields of `GenerationRequest`, e.g. `seed=7`.

        Raises:
            FieldError: a name or a number is none that the contract can say; a ValueError.
            GenerationFailed: the service refused or failed.
        """
        collected = Collected()
        with closing(self.events(what, timeout_s=timeout_s, **knobs)) as events:
            for event in events:
                collected.add(event)
                if on_event is not None:
                    on_event(event)
        return collected.generation()

    def events(
        self, what: str | GenerationRequest, *, timeout_s: float | None = None, **knobs: Any
    ) -> Generator[Event, None, None]:
        """Draw, and yield what happens; see `generate`. Closing the generator cancels the call."""
        return self._drawing().generate(asked(what, knobs), timeout_s=self._deadline_s(timeout_s))

    def generate_images(
        self, what: str | GenerationRequest, *, timeout_s: float | None = None, **knobs: Any
    ) -> Generation:
        """Draw by one call with one answer, for where streams do not pass; see `generate`."""
        return self._drawing().generate_images(asked(what, knobs), timeout_s=self._deadline_s(timeout_s))

    def models(self) -> Models:
        """What the generator draws with."""
        return self._drawing().models()

    def health(self) -> tuple[ServiceHealth, ...]:
        """Whether each service answers; never fails."""
        parts = [part for part in (self._generator, self._bases, self._trainer) if part is not None]
        return tuple(found for part in parts for found in part.health())

    def _drawing(self) -> GeneratorClient:
        if self._generator is None:
            raise ValueError("generator: the client was given no address of it")
        return self._generator

    def _deadline_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s
