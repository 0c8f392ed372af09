"""The thread that keeps the lexical index in step with its store."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from retrieval_svc import projection as projections
from retrieval_svc import replica_feed
from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.pairs import Change, Lookup, StoredPair, point_of
from retrieval_svc.projection import Projection
from retrieval_svc.replica_feed import ChangeFeed, ReplicaProjection


class HistoryStore:
    """The part of a pair store that a projection reads, in memory."""

    def __init__(self) -> None:
        self._changes: dict[str, Change] = {}
        self.error: Exception | None = None
        self.num_reads = 0

    def upsert(self, pair_id: str, entity: str, version: int) -> None:
        pair = StoredPair(pair_id=pair_id, caption=entity, entity=entity, version=version)
        self._changes[pair_id] = Change(point=point_of(pair_id), version=version, pair=pair)

    def delete(self, pair_id: str, version: int) -> None:
        self._changes[pair_id] = Change(point=point_of(pair_id), version=version, pair=None)

    def drop_tombstones(self) -> None:
        self._changes = {name: change for name, change in self._changes.items() if change.pair is not None}

    def changes(self, since: int, limit: int) -> list[Change]:
        self.num_reads += 1
        if self.error is not None:
            raise self.error
        newer = sorted((c for c in list(self._changes.values()) if c.version > since), key=lambda c: c.version)
        return newer[:limit]

    def latest_version(self) -> int:
        if self.error is not None:
            raise self.error
        return max((change.version for change in self._changes.values()), default=0)


class CountingIndex:
    """Writes down what it is told to take in."""

    def __init__(self) -> None:
        self.generation = 0
        self.applied: list[list[int]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def apply(self, changes: Sequence[Change]) -> None:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.applied.append([change.version for change in changes])
        self.generation = max(self.generation, changes[-1].version)

    def rebuild(self, batches: Iterable[Sequence[Change]]) -> None:
        self.applied.append([-1])
        for changes in batches:
            self.apply(changes)


@contextmanager
def running(store: HistoryStore, index: CountingIndex | TantivyIndex, **options: object) -> Iterator[Projection]:
    projection = Projection(store, index, **options)  # type: ignore[arg-type]
    try:
        yield projection
    finally:
        projection.close()


def until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def found(index: TantivyIndex, entity: str) -> list[str]:
    return sorted(hit.pair.pair_id for hit in index.search(Lookup(entity=entity)))


def test_changes_are_seen_soon_after_a_wake_up(tmp_path: Path) -> None:
    store, index = HistoryStore(), TantivyIndex.open(tmp_path / "index")
    store.upsert("a", "cat", 1)
    with running(store, index) as projection:
        until(lambda: index.generation == 1)  # what was there before it started
        store.upsert("b", "cat", 2)
        store.upsert("a", "dog", 3)
        projection.wake()
        until(lambda: index.generation == 3)
        assert (found(index, "cat"), found(index, "dog")) == (["b"], ["a"])
        store.delete("b", 4)
        projection.wake()
        until(lambda: index.generation == 4)
        assert found(index, "cat") == []


def test_after_a_restart_it_goes_on_from_its_cursor(tmp_path: Path) -> None:
    store, index = HistoryStore(), TantivyIndex.open(tmp_path / "index")
    store.upsert("a", "cat", 1)
    store.upsert("b", "cat", 2)
    with running(store, index) as projection:
        assert projection.catch_up() == 2
    index.close()
    store.delete("a", 3)
    index = TantivyIndex.open(tmp_path / "index")
    assert index.generation == 2
    with running(store, index) as projection:
        assert projection.catch_up() == 3
        assert found(index, "cat") == ["b"]


def test_it_works_in_batches_and_wake_ups_meanwhile_are_one() -> None:
    store, index = HistoryStore(), CountingIndex()
    for version in range(1, 8):
        store.upsert(f"p{version}", "cat", version)
    index.gate.clear()
    with running(store, index, batch_changes=3) as projection:
        until(lambda: store.num_reads == 1)
        for _ in range(100):
            projection.wake()
        index.gate.set()
        until(lambda: index.generation == 7)
        assert index.applied == [[1, 2, 3], [4, 5, 6], [7]]
        until(lambda: store.num_reads == 4)
        time.sleep(0.05)
        assert store.num_reads == 4, "three batches, and one look for a hundred wake-ups"


def test_catching_up_by_hand_may_go_on_beside_the_thread() -> None:
    store, index = HistoryStore(), CountingIndex()
    with running(store, index, batch_changes=2) as projection:

        def write_and_catch_up() -> None:
            for version in range(1, 20):
                store.upsert(f"p{version}", "cat", version)
                projection.wake()
                assert projection.catch_up() >= version

        threads = [threading.Thread(target=work) for work in (write_and_catch_up, *[projection.catch_up] * 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    versions = [version for batch in index.applied for version in batch]
    assert versions == list(range(1, 20)), "each once, in order"


def test_an_error_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "FIRST_RETRY_S", 0.01)
    store, index = HistoryStore(), CountingIndex()
    store.error = OSError(errno.EIO, "the store has gone")
    told: list[Exception] = []
    with running(store, index, on_error=told.append) as projection:
        until(lambda: len(told) >= 2)
        assert projection.last_error is store.error
        with pytest.raises(OSError, match="the store has gone"):
            projection.catch_up()
        store.upsert("a", "cat", 1)
        store.error, index.error = None, OSError(errno.ENOSPC, "full")
        until(lambda: isinstance(projection.last_error, OSError) and projection.last_error.errno == errno.ENOSPC)
        index.error = None
        until(lambda: index.generation == 1)  # nobody wakes it
        until(lambda: projection.last_error is None)


def test_retries_come_slower_and_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "FIRST_RETRY_S", 0.02)
    store, index = HistoryStore(), CountingIndex()
    store.error = OSError(errno.EIO, "gone")
    at: list[float] = []
    with running(store, index, on_error=lambda _: at.append(time.monotonic())) as projection:
        for _ in range(20):
            projection.wake()  # writers do not make it try more often
            time.sleep(0.01)
        until(lambda: len(at) >= 4)
    assert at[2] - at[1] >= 0.04 and at[3] - at[2] >= 0.08


def test_lag_is_the_age_of_the_oldest_change_it_lacks() -> None:
    store, index = HistoryStore(), CountingIndex()
    with running(store, index) as projection:
        projection.catch_up()
        assert projection.lag == 0
        store.upsert("a", "cat", time.time_ns() - 5_000_000_000)
        store.upsert("b", "cat", time.time_ns())
        assert 5 <= projection.lag < 6
        projection.catch_up()
        assert projection.lag == 0


def test_a_store_that_others_write_is_polled_and_read_with_an_overlap() -> None:
    """Another writer's clock is behind: its change comes in below the newest version, and is found."""
    store, index = HistoryStore(), CountingIndex()
    store.upsert("a", "cat", 1000)
    with running(store, index, poll_s=0.01, overlap_ns=100):
        until(lambda: index.applied == [[1000]])
        store.upsert("late", "cat", 950)
        until(lambda: len(index.applied) == 2)
        store.upsert("b", "cat", 2000)
        until(lambda: len(index.applied) == 3)
        num_reads = store.num_reads
        until(lambda: store.num_reads > num_reads + 3)
    assert index.applied == [[1000], [950], [2000]], "nothing is written twice"
    assert index.generation == 2000


def test_a_replica_looks_far_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that took its time: it comes in seconds below the newest version."""
    monkeypatch.setattr(replica_feed, "WIDE_EVERY_S", 0.05)
    store, index = HistoryStore(), CountingIndex()
    heard: list[int] = []
    feed = ChangeFeed(index)
    feed.before = lambda changes: heard.extend(change.version for change in changes)
    now = 100 * replica_feed.NARROW_NS
    store.upsert("a", "cat", now)
    projection = ReplicaProjection(store, feed, poll_s=0.01, write_timeout_s=10.0)  # type: ignore[arg-type]
    try:
        until(lambda: index.applied == [[now]])
        store.upsert("narrow", "cat", now - replica_feed.NARROW_NS // 2)
        store.upsert("wide", "cat", now - 5 * replica_feed.NARROW_NS)
        until(lambda: sum(map(len, index.applied)) == 3)
        num_reads = store.num_reads
        until(lambda: store.num_reads > num_reads + 20)
    finally:
        projection.close()
    assert sorted(heard) == sorted(version for batch in index.applied for version in batch), "nothing is written twice"


def test_a_feed_without_an_index_keeps_its_place() -> None:
    store, heard = HistoryStore(), []
    feed = ChangeFeed(None, generation=5)
    feed.after = lambda: heard.append(feed.generation)
    store.upsert("b", "cat", 9)
    projection = ReplicaProjection(store, feed, poll_s=0.01, write_timeout_s=1.0)  # type: ignore[arg-type]
    until(lambda: feed.generation == 9)
    projection.close()
    assert heard == [9]


def test_rebuilding_forgets_what_the_store_no_longer_remembers(tmp_path: Path) -> None:
    """A deletion whose tombstone was dropped before this replica came by."""
    store, index = HistoryStore(), TantivyIndex.open(tmp_path / "index")
    store.upsert("gone", "cat", 1)
    store.upsert("a", "cat", 2)
    with running(store, index, batch_changes=1) as projection:
        projection.catch_up()
        store.delete("gone", 3)
        store.drop_tombstones()
        store.upsert("b", "cat", 4)
        projection.catch_up()
        assert found(index, "cat") == ["a", "b", "gone"]
        assert projection.rebuild() == 4
        assert found(index, "cat") == ["a", "b"]


def test_an_index_that_is_ahead_of_its_store_is_written_anew() -> None:
    """The store was put back from a snapshot; the index beside it was not."""
    store, index = HistoryStore(), CountingIndex()
    store.upsert("a", "cat", 5)
    index.generation = 9
    with running(store, index) as projection:
        projection.catch_up()
        assert index.applied == [[-1], [5]]
        index.generation = 5
        projection.catch_up()
        assert index.applied == [[-1], [5]]


@pytest.mark.parametrize("broken", [False, True])
def test_it_stops_promptly(broken: bool) -> None:
    store, index = HistoryStore(), CountingIndex()
    for version in range(1, 100):
        store.upsert(f"p{version}", "cat", version)
    store.error = OSError(errno.EIO, "gone") if broken else None
    index.gate.clear()
    projection = Projection(store, index, batch_changes=1)  # type: ignore[arg-type]
    until(lambda: store.num_reads == 1 or projection.last_error)
    closing = threading.Thread(target=projection.close)
    closing.start()
    until(lambda: projection._closing.is_set())
    index.gate.set()
    closing.join(2)
    assert not closing.is_alive()
    assert len(index.applied) <= 1, "after the commit that was under way"
    projection.close()
