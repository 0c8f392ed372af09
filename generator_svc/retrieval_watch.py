"""Whether retrieval can be asked now: what the generator's own health rests on where it draws nothing without it, and what
spares orders the waiting where it draws without."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from common.service.errors import DeadlineExceeded, ServiceError

INTERVAL_S = 1.0
TIMEOUT_S = 2.0
SILENT_S = 10.0  # a busy service is not a dead one: its silence counts only when it lasts

log = logging.getLogger(__name__)


class Probed(Protocol):
    """Says how it does."""

    async def check(self, *, timeout_s: float) -> None:
        """Returns where it serves; raises DeadlineExceeded where it says nothing, another ServiceError where it does not."""
        ...


class RetrievalWatch:
    """Asks retrieval again and again; used as a context."""

    def __init__(
        self,
        retrieval: Probed,
        *,
        on_usable: Callable[[bool], object],
        interval_s: float = INTERVAL_S,
        timeout_s: float = TIMEOUT_S,
        silent_s: float = SILENT_S,
    ) -> None:
        """
        Args:
            retrieval: whom to ask.
            on_usable: told whether it can be asked, at the start and whenever that changes.
            interval_s: between questions.
            timeout_s: what an answer may take.
            silent_s: without any answer for so long it is taken for dead; one that refuses is so at once.
        """
        self._retrieval = retrieval
        self._on_usable = on_usable
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._silent_s = silent_s
        self._was_usable: bool | None = None
        self._fault = ""
        self._heard_at = float("-inf")
        self._watching: asyncio.Task[None] | None = None

    @property
    def fault(self) -> str:
        """Why it cannot be asked, as far as is known; empty where it can."""
        return self._fault

    async def __aenter__(self) -> RetrievalWatch:
        await self._ask()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *raised: object) -> None:
        assert self._watching is not None
        self._watching.cancel()
        with suppress(asyncio.CancelledError):
            await self._watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._ask()

    async def _ask(self) -> None:
        try:
            await self._retrieval.check(timeout_s=self._timeout_s)
        except DeadlineExceeded as silence:
            if time.monotonic() - self._heard_at > self._silent_s:
                self._tell(False, silence.description)
        except ServiceError as refusal:
            self._tell(False, refusal.description)
        else:
            self._heard_at = time.monotonic()
            self._tell(True, "")

    def _tell(self, usable: bool, reason: str) -> None:
        self._fault = "" if usable else reason or "retrieval does not serve"
        if usable != self._was_usable:
            self._was_usable = usable
            log.log(logging.INFO if usable else logging.WARNING, "retrieval", extra={"missing": reason})
            self._on_usable(usable)
