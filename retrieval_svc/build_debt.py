"""How far the graph of a knowledge base is behind its pairs, and when building it anew is worth it."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

MIN_CHANGES = 10_000  # fewer pairs than that are compared one by one in no time
CHANGED_SHARE = 5  # or a fifth of all pairs, whichever is more
_MARKER = "unbuilt"


class BuildDebt:
    """How many changes the graph of a knowledge base does not have. A file in its folder says so to the next process."""

    def __init__(self, folder: Path, num_pairs: int) -> None:
        """Changes that an earlier process has left are taken for all of the `num_pairs`."""
        self._marker = folder / _MARKER
        self._lock = threading.Lock()
        self._num_changes = num_pairs if self._marker.exists() else 0

    def add(self, num_changes: int) -> None:
        """So many pairs have been stored or deleted."""
        with self._lock:
            if not self._num_changes:
                with suppress(OSError):  # the changes themselves are stored
                    self._marker.touch()
            self._num_changes += num_changes

    def is_due(self, num_pairs: int) -> bool:
        """Whether building is worth it."""
        return self._num_changes >= max(MIN_CHANGES, num_pairs // CHANGED_SHARE)

    def begin(self) -> int:
        """Called before a graph is built; gives what `end` wants."""
        return self._num_changes

    def end(self, begun: int) -> None:
        """The graph has all changes that there were when it was begun."""
        with self._lock:
            self._num_changes -= begun
            if not self._num_changes:
                self._marker.unlink(missing_ok=True)
