"""What a replica hears of the changes that others make in the store that they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from retrieval_svc.pairs import Change, PairStore
from retrieval_svc.projection import Projected, Projection

TOMBSTONES_KEPT_NS = 30 * 24 * 3600 * 1_000_000_000  # a replica that was away longer begins anew
NARROW_NS = 2_000_000_000  # clocks of replicas differ by less, as a rule, and a write takes less
WIDE_EVERY_S = 10.0
MARGIN_NS = 20_000_000_000


class ChangeFeed:
    """Hands changes on to an index, and tells a listener; without an index it only keeps the cursor."""

    def __init__(self, index: Projected | None, *, generation: int = 0) -> None:
        """`generation`: where it begins without an index."""
        self._index = index
        self._generation = generation
        self.before: Callable[[Sequence[Change]], None] = lambda changes: None
        self.after: Callable[[], None] = lambda: None

    @property
    def generation(self) -> int:
        """Version of the newest change that has come in."""
        return self._index.generation if self._index else self._generation

    def apply(self, changes: Sequence[Change]) -> None:
        """Take changes in; the listener hears of them before the index, and afterwards that it has them."""
        self.before(changes)
        if self._index:
            self._index.apply(changes)
        else:
            self._generation = max([self._generation, *(change.version for change in changes)])
        self.after()

    def rebuild(self, batches: Iterator[Sequence[Change]]) -> None:
        """Take in all that the store holds."""
        if self._index:
            self._index.rebuild(self._told(batches))
        else:
            for changes in batches:
                self.apply(changes)
        self.after()

    def _told(self, batches: Iterator[Sequence[Change]]) -> Iterator[Sequence[Change]]:
        for changes in batches:
            self.before(changes)
            yield changes


class ReplicaProjection(Projection):
    """Looks for what other replicas write, many times a second.

    A change may come in below the newest version: another clock is behind, or the write took its time. So each look goes back
    a little, and one now and then as far as the slowest write that is not given up.
    """

    def __init__(self, store: PairStore, feed: ChangeFeed, *, poll_s: float, write_timeout_s: float) -> None:
        """`write_timeout_s`: after which a write is given up."""
        self._next_wide = 0.0
        wide_ns = int(write_timeout_s * 1e9) + MARGIN_NS
        super().__init__(store, feed, poll_s=poll_s, overlap_ns=wide_ns)

    def _reread_ns(self) -> int:
        if time.monotonic() < self._next_wide:
            return NARROW_NS
        self._next_wide = time.monotonic() + WIDE_EVERY_S
        return self._overlap_ns
