"""A request with an id is drawn once, however often it is sent (AIP-155): others join it, or are given what it drew."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import fields, is_dataclass
from typing import Any

from common.service.errors import InvalidArgument, Unavailable
from generator_svc.call import Call
from generator_svc.events import Event, StepDone

Begin = Callable[[Call], AsyncGenerator[Event, None]]
"""Draws, for whoever the call says waits."""

_MAX_STEPS = 256  # of one drawing that somebody who joins late still hears of
_MAX_STEP_BYTES = 16 << 20  # likewise, with their previews
_EVENT_BYTES = 200  # of an event beside what it carries


class SharedDrawings:
    """Drawings by the ids of their requests: those under way, and those that ended a short while ago.

    Each goes on at its own pace, whoever reads it slowly, and ends when nobody listens any more.
    """

    def __init__(self, *, kept_s: float, kept_bytes: int) -> None:
        """What is done is kept for `kept_s` seconds, and in `kept_bytes` of memory at most, the oldest going first."""
        self._kept_s = kept_s
        self._kept_bytes = kept_bytes
        self._drawings: dict[str, _Drawing] = {}
        self._kept: dict[str, tuple[_Drawing, asyncio.TimerHandle]] = {}  # the oldest first
        self._held_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def held_bytes(self) -> int:
        """Memory that finished drawings take."""
        return self._held_bytes

    async def draw(self, request_id: str, content: bytes, call: Call, begin: Begin) -> AsyncGenerator[Event, None]:
        """The events of a request, from the first: of its own drawing, or of the one that has its id.

        Whoever leaves, leaves alone; the drawing ends when nobody is left. A drawing that fails is forgotten.

        Args:
            request_id: a UUID; empty: this drawing is nobody else's.
            content: what must be the same for two requests to be one, e.g. a digest.
            call: who waits.
            begin: draws; called where no drawing has the id.

        Raises:
            InvalidArgument: `request_id` is no UUID, or names a request with other content.
            ServiceError: as `begin` does.
        """
        is_named, request_id = bool(request_id), _canonical(request_id)
        drawing = self._drawings.get(request_id)
        if drawing is None:
            drawing = self._drawings[request_id] = _Drawing(content)
            drawing.task = asyncio.create_task(self._run(request_id, drawing, begin, call.arrived_s, keep=is_named))
            self._tasks.add(drawing.task)
            drawing.task.add_done_callback(self._tasks.discard)
        elif drawing.content != content:
            raise InvalidArgument(
                "request_id",
                f"{request_id} is the id of a request with other content, drawn now or a short while ago",
                reason="REQUEST_ID_REUSED",
            )
        caller = object()  # two calls may be equal
        drawing.callers[caller] = call
        try:
            async for event in drawing.events():
                yield event
        finally:
            del drawing.callers[caller]
            if not drawing.callers and drawing.task is not None and not drawing.is_over:
                self._forget(request_id, drawing)
                drawing.task.cancel()

    async def close(self) -> None:
        """Stop what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request_id: str, drawing: _Drawing, begin: Begin, arrived_s: float, *, keep: bool) -> None:
        call = Call(
            is_cancelled=lambda: not drawing.callers, time_remaining_s=drawing.time_remaining_s, arrived_s=arrived_s
        )
        try:
            async with aclosing(begin(call)) as events:
                async for event in events:
                    drawing.put(event)
        except Exception as error:
            self._forget(request_id, drawing)
            drawing.end(error)
        except asyncio.CancelledError:
            self._forget(request_id, drawing)
            drawing.end(Unavailable("the service is stopping"))
            raise
        else:
            drawing.end(None)
            self._keep(request_id, drawing, is_wanted=keep)

    def _keep(self, request_id: str, drawing: _Drawing, *, is_wanted: bool) -> None:
        self._forget(request_id, drawing)
        if not is_wanted or self._kept_s <= 0:
            return
        result = drawing.result()  # a copy: those who listen still hear the steps as well
        if result.bytes > self._kept_bytes:
            return
        while self._held_bytes + result.bytes > self._kept_bytes:
            self._expire(next(iter(self._kept)))
        timer = asyncio.get_running_loop().call_later(self._kept_s, self._expire, request_id)
        self._drawings[request_id], self._kept[request_id] = result, (result, timer)
        self._held_bytes += result.bytes

    def _expire(self, request_id: str) -> None:
        drawing, timer = self._kept.pop(request_id)
        timer.cancel()
        self._held_bytes -= drawing.bytes
        self._forget(request_id, drawing)

    def _forget(self, request_id: str, drawing: _Drawing) -> None:
        if self._drawings.get(request_id) is drawing:
            del self._drawings[request_id]


class _Drawing:
    """One drawing: what it has said so far, and who listens."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.callers: dict[object, Call] = {}
        self.task: asyncio.Task[None] | None = None
        self.is_over = False
        self.bytes = 0
        self._said: list[Event | None] = []
        self._steps: deque[tuple[int, int]] = deque()  # (place in `_said`, bytes), the oldest first
        self._step_bytes = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def time_remaining_s(self) -> float | None:
        """Until the last of the callers' deadlines; None: somebody has none."""
        remaining = [call.time_remaining_s() for call in self.callers.values()]
        known = [seconds for seconds in remaining if seconds is not None]
        return max(known, default=0.0) if len(known) == len(remaining) else None

    def put(self, event: Event) -> None:
        """Say something."""
        size = _bytes(event)
        self._said.append(event)
        self.bytes += size
        if isinstance(event, StepDone):
            self._steps.append((len(self._said) - 1, size))
            self._step_bytes += size
            while len(self._steps) > _MAX_STEPS or self._step_bytes > _MAX_STEP_BYTES:
                self._drop_step()
        self._ring()

    def result(self) -> _Drawing:
        """What is kept of it: all but the steps on the way."""
        kept = _Drawing(self.content)
        for event in self._said:
            if event is not None and not isinstance(event, StepDone):
                kept.put(event)
        kept.is_over = True
        return kept

    def end(self, error: BaseException | None) -> None:
        """Nothing more is said."""
        self.is_over, self._error = True, error
        self._ring()

    async def events(self) -> AsyncIterator[Event]:
        """All that is said, from the start; a reader that falls far behind misses steps."""
        at = 0
        while True:
            while at < len(self._said):
                event = self._said[at]
                at += 1
                if event is not None:
                    yield event
            if self.is_over:
                if self._error is not None:
                    raise self._error.with_traceback(None)
                return
            await self._changed.wait()

    def _drop_step(self) -> None:
        place, size = self._steps.popleft()
        self._said[place] = None
        self._step_bytes -= size
        self.bytes -= size

    def _ring(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _canonical(request_id: str) -> str:
    if not request_id:
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(request_id))
    except ValueError:
        raise InvalidArgument("request_id", f"{request_id!r} is not a UUID") from None


def _bytes(value: Any) -> int:
    """About how much memory a value takes."""
    if isinstance(value, bytes | str):
        return len(value)
    if is_dataclass(value):
        return _EVENT_BYTES + sum(_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return sum(_bytes(key) + _bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return 8
