"""Counts the calls that use something, so that it is closed only when the last one has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class InFlight:
    """`with in_flight:` around every use; `close` refuses further ones and waits for those under way."""

    def __init__(self, closed: Callable[[], Exception]) -> None:
        """`closed` makes the error of a use that comes too late."""
        self._closed = closed
        self._changed = threading.Condition()
        self._num = 0
        self._is_closed = False

    def __enter__(self) -> None:
        with self._changed:
            if self._is_closed:
                raise self._closed()
            self._num += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._num -= 1
            if self._num == 0:
                self._changed.notify_all()

    def close(self) -> bool:
        """Wait until nobody uses it; gives whether this call was the first to close it."""
        with self._changed:
            was_closed, self._is_closed = self._is_closed, True
            self._changed.wait_for(lambda: self._num == 0)
            return not was_closed
