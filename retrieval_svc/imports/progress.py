"""How far an import is: a bar on a terminal, a line now and then elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0


class ImportProgress:
    """Called with the number of records done since the last call."""

    def __init__(self, total: int | None, stream: TextIO | None = None) -> None:
        """`total` None: not known."""
        self._stream = stream or sys.stderr
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._said = self._started
        shown = self._stream.isatty()
        self._bar = tqdm(desc="import", unit=" pairs", total=total, file=self._stream) if shown else None

    def __call__(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._say()

    def close(self) -> None:
        """The import has ended, well or not."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = self._done / max(self._said - self._started, 1e-9)
        total = "" if self._total is None else f"/{self._total}"
        print(f"import: {self._done}{total} records, {rate:.0f}/s", file=self._stream, flush=True)
