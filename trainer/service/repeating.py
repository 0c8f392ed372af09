"""Something done again and again on a thread of its own, at once when it is asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Repeating:
    """Calls `body` every `pause_s` seconds, and when woken; what it raises is logged, and it is called again."""

    def __init__(self, name: str, body: Callable[[], object], *, pause_s: float) -> None:
        self._body = body
        self._pause_s = pause_s
        self._bell = threading.Event()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_ending = True
        self._bell.set()
        self._thread.join()

    def wake(self) -> None:
        """Call it now."""
        self._bell.set()

    def _run(self) -> None:
        while not self._is_ending:
            self._bell.clear()
            try:
                self._body()
            except Exception:
                log.exception("%s failed", self._thread.name)
            self._bell.wait(self._pause_s)
