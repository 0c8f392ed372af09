"""The import itself: records are read in order, a few pictures ahead, and stored in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

from retrieval_svc.imports.records import (
    Options,
    Record,
    Rejected,
    Source,
    Unreadable,
    to_new_pair,
)
from retrieval_svc.imports.report import Journal, Summary
from retrieval_svc.imports.sinks import BatchRefused, Sink
from retrieval_svc.pairs import NewPair, Outcome, Upserted

THREADS = 4
CHUNK = 16  # records that a thread reads in one go: handing over costs more than a small picture
AHEAD = 3  # chunks read before their turn; each picture may have 20 MB

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A record with its picture."""

    key: str
    pair: NewPair

    @property
    def num_bytes(self) -> int:
        """About what it takes in a message."""
        texts = (self.pair.caption, self.pair.entity, self.pair.author, self.pair.source, self.pair.license)
        attributes = sum(len(name) + len(value) + 8 for name, value in self.pair.attributes.items())
        return len(self.pair.image) + 4 * sum(map(len, texts)) + 4 * attributes + 256


def run_import(source: Source, sink: Sink, options: Options, journal: Journal, progress: Progress) -> Summary:
    """Store the records of `source`, from where `journal` says that an interrupted import stopped.

    Args:
        source: what to import.
        sink: where to.
        options: defaults of what records do not say.
        journal: takes the rejected records and the counts.
        progress: called with the number of records done since it was called last.

    Raises:
        OSError: the disk is full, or the source cannot be read any more.
        ServiceLost: the service is away. A later run goes on from there.
    """
    try:
        progress(journal.position)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="read") as pool:
            batch = _Batch(sink, journal, progress)
            waiting = _once(source.records(), done=journal.position)
            read = partial(_ready, options=options, name=source.name)
            for items in _in_order(pool, lambda chunk: [read(item) for item in chunk], _chunks(waiting)):
                for item in items:
                    batch.add(item)
            batch.flush()
        sink.finish()
        return journal.finish({"source": source.name, "knowledge_base": sink.identity})
    except BaseException:
        journal.abandon()
        raise


def _once(items: Iterable[Record | Rejected], *, done: int) -> Iterator[Record | Rejected]:
    """The items after the first `done`; a key that comes again is rejected.

    Two records of one key would replace each other on every run. Keys are remembered by 64 bits of their hash.
    """
    seen: set[int] = set()
    for number, item in enumerate(items):
        if isinstance(item, Record):
            mark = hash(item.pair_id or item.key)
            if mark in seen:
                item = Rejected(key=item.key, reason="key used twice", detail="the first record of this key is taken")
            seen.add(mark)
        if number >= done:
            yield item


def _ready(item: Record | Rejected, *, options: Options, name: str) -> _Ready | Rejected:
    """Read the record's picture (on a thread)."""
    if isinstance(item, Rejected):
        return item
    try:
        image = item.load() if item.load is not None else b""
        return _Ready(key=item.key, pair=to_new_pair(item, image, options, name))
    except Unreadable as error:
        return Rejected(key=item.key, reason=error.reason, detail=error.detail)


def _chunks(items: Iterator[Record | Rejected]) -> Iterator[list[Record | Rejected]]:
    while chunk := list(islice(items, CHUNK)):
        yield chunk


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[list[Record | Rejected]], list[_Ready | Rejected]],
    chunks: Iterator[list[Record | Rejected]],
) -> Iterator[list[_Ready | Rejected]]:
    """What `work` makes of the chunks, in their order, a few ahead."""
    under_way: deque[Future[list[_Ready | Rejected]]] = deque()
    for chunk in chunks:
        under_way.append(pool.submit(work, chunk))
        if len(under_way) >= AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


class _Batch:
    """Gathers items until they are enough for the sink; rejected ones keep their place among them."""

    def __init__(self, sink: Sink, journal: Journal, progress: Progress) -> None:
        self._sink = sink
        self._journal = journal
        self._progress = progress
        self._items: list[_Ready | Rejected] = []
        self._num_pairs = 0
        self._num_bytes = 0

    def add(self, item: _Ready | Rejected) -> None:
        if isinstance(item, _Ready):
            if self._num_pairs and self._num_bytes + item.num_bytes > self._sink.max_bytes:
                self.flush()
            self._num_pairs += 1
            self._num_bytes += item.num_bytes
        self._items.append(item)
        if self._num_pairs >= self._sink.max_pairs or len(self._items) >= 4 * self._sink.max_pairs:
            self.flush()

    def flush(self) -> None:
        ready = [item for item in self._items if isinstance(item, _Ready)]
        results = _stored(self._sink, [item.pair for item in ready])
        self._journal.stored((item.key, result) for item, result in zip(ready, results, strict=True))
        for item in self._items:
            if isinstance(item, Rejected):
                self._journal.reject(item)
        self._journal.checkpoint(self._journal.position + len(self._items))
        self._progress(len(self._items))
        self._items, self._num_pairs, self._num_bytes = [], 0, 0


def _stored(sink: Sink, pairs: Sequence[NewPair]) -> list[Upserted]:
    """Store the pairs; a batch that is refused is halved until the pairs at fault stand alone."""
    if not pairs:
        return []
    try:
        return sink.upsert(pairs)
    except BatchRefused as error:
        if len(pairs) == 1:
            refused = Upserted(
                pair_id=pairs[0].pair_id, outcome=Outcome.REJECTED, field=error.field, reason=error.reason
            )
            return [refused]
    middle = len(pairs) // 2
    return _stored(sink, pairs[:middle]) + _stored(sink, pairs[middle:])
