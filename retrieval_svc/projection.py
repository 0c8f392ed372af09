"""Keeps a lexical index in step with the store that is the source of truth, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from retrieval_svc.pairs import Change, PairStore

BATCH_CHANGES = 2000  # one commit takes in so many
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 10.0

_NS_PER_S = 1_000_000_000
_log = logging.getLogger(__name__)


class Projected(Protocol):
    """An index that takes in the changes of a store."""

    @property
    def generation(self) -> int:
        """Version of the newest change it has."""
        ...

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in changes, oldest first; to apply one again changes nothing."""
        ...

    def rebuild(self, batches: Iterator[Sequence[Change]]) -> None:
        """Take in all that the store holds; afterwards nothing else is there."""
        ...


class Projection:
    """A thread that reads what has changed in the store and writes it into the index.

    Wake-ups while it works are one; an error is told to `on_error` and tried again, later each time.
    """

    def __init__(
        self,
        store: PairStore,
        index: Projected,
        *,
        on_error: Callable[[Exception], None] | None = None,
        poll_s: float | None = None,
        overlap_ns: int = 0,
        batch_changes: int = BATCH_CHANGES,
    ) -> None:
        """Start the thread, which catches up at once.

        Args:
            poll_s: look for changes that often, for a store that others write; None: only when woken.
            overlap_ns: how far the clocks of several writers may differ: a change may come in with a version
                that much below the newest one, and is found nevertheless.
            batch_changes: changes a commit.
        """
        self._store = store
        self._index = index
        self._on_error = on_error
        self._poll_s = poll_s
        self._overlap_ns = overlap_ns
        self._batch_changes = batch_changes
        self._working = threading.Lock()
        self._is_checked = False
        self._recent: dict[str, int] = {}  # versions, by point, within the overlap that are in the index
        self._woken = threading.Event()
        self._woken.set()
        self._closing = threading.Event()
        self._last_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="projection", daemon=True)
        self._thread.start()

    @property
    def last_error(self) -> Exception | None:
        """Why the index is not up to date; None: the last try went well."""
        return self._last_error

    @property
    def lag(self) -> float:
        """Seconds since the oldest change that the index does not have yet; 0: it has all.

        Raises:
            Exception: the store cannot be asked.
        """
        waiting = self._store.changes(self._index.generation, 1)
        return max(0.0, (time.time_ns() - waiting[0].version) / _NS_PER_S) if waiting else 0.0

    def wake(self) -> None:
        """There are new changes; returns at once."""
        self._woken.set()

    def catch_up(self) -> int:
        """Take in all changes up to now, in the calling thread; gives the generation that is reached.

        Raises:
            Exception: of the store or the index.
        """
        with self._working:
            self._take_in(until_closing=False)
            return self._index.generation

    def rebuild(self) -> int:
        """Write the index anew from all that the store holds; gives the generation that is reached.

        For an index whose generation is older than the oldest deletion that the store still knows: it would keep
        what was deleted before. Searches go on meanwhile.

        Raises:
            Exception: of the store or the index.
        """
        with self._working:
            self._recent.clear()
            self._index.rebuild(self._batches(0))
            return self._index.generation

    def close(self) -> None:
        """Stop after the commit that is under way."""
        self._closing.set()
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s, retry_s = self._poll_s, FIRST_RETRY_S
        while True:
            self._woken.wait(wait_s)
            if self._closing.is_set():
                return
            self._woken.clear()
            try:
                with self._working:
                    self._take_in(until_closing=True)
            except Exception as error:  # whatever it is: the index falls behind, and searches go on
                self._failed(error)
                # Not sooner for a wake-up: writers go on while the disk is full.
                self._closing.wait(retry_s)
                wait_s, retry_s = 0.0, min(retry_s * 2, LAST_RETRY_S)
            else:
                self._last_error = None
                wait_s, retry_s = self._poll_s, FIRST_RETRY_S

    def _failed(self, error: Exception) -> None:
        self._last_error = error
        _log.warning("the lexical index could not catch up: %s", error)
        if self._on_error is not None:
            self._on_error(error)

    def _take_in(self, *, until_closing: bool) -> None:
        if not self._is_checked:
            if self._store.latest_version() < self._index.generation:  # the store was put back to an older state
                _log.warning("the lexical index is ahead of its store and is written anew")
                self._index.rebuild(self._batches(0))
            self._is_checked = True
        for changes in self._batches(max(0, self._index.generation - self._reread_ns())):
            fresh = [change for change in changes if self._recent.get(change.point) != change.version]
            if fresh:
                self._index.apply(fresh)
                self._remember(fresh)
            if until_closing and self._closing.is_set():
                return

    def _reread_ns(self) -> int:
        """How far below the newest version it looks this time."""
        return self._overlap_ns

    def _batches(self, since: int) -> Iterator[Sequence[Change]]:
        """The store's changes from `since` to the newest."""
        while changes := self._store.changes(since, self._batch_changes):
            yield changes
            if len(changes) < self._batch_changes:
                return
            since = changes[-1].version

    def _remember(self, changes: Sequence[Change]) -> None:
        """What is read again because of the overlap need not be written again."""
        if self._overlap_ns:
            oldest = self._index.generation - self._overlap_ns
            self._recent |= {change.point: change.version for change in changes}
            self._recent = {point: version for point, version in self._recent.items() if version > oldest}
