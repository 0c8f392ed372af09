"""KNN-ImageText: each pair's nearest *other* pairs, asked of the retrieval service (Re-Imagen, section 4.1).

The corpus' pairs are cut into shards that any number of processes ask, each for itself; `merge` checks that they are
all there and belong together, and writes what training reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

from common.corpus import CorpusError, Pair, iter_shard, read_manifest
from trainer.dataset import Progress
from trainer.knn_lookup import Lookup, Question, Service
from trainer.knn_merge import description_path, merge, neighbors_path
from trainer.knn_shards import (
    Asked,
    Header,
    Parts,
    ShardError,
    joined,
    neighborhoods,
    read_header,
    retrieval_id,
    write,
)

CANDIDATES = 12  # training draws its k of these
PART_PAIRS = 2048  # what an interruption loses at most
NUM_REASONS = 5

log = logging.getLogger(__name__)


def asked_of(corpus: Path, *, knowledge_base: str, method: str, k: int, num_shards: int) -> Asked:
    """The question for every pair of a corpus.

    Raises:
        CorpusError: there is none.
        ValueError: method, k or num_shards cannot be.
    """
    manifest = read_manifest(corpus)
    return Asked(
        corpus=manifest.fingerprint,
        num_pairs=manifest.num_pairs,
        knowledge_base=knowledge_base,
        method=method,
        k=k,
        num_shards=num_shards,
    )


def write_neighbors(corpus: Path, folder: Path, service: Service, asked: Asked, progress: Progress) -> Path:
    """Ask all shards that are not there yet, one after the other, and merge them; what is there is kept.

    Gives the file that training reads: `<folder>/knn/<fingerprint>.npy`.
    """
    if is_written(folder, asked):
        return neighbors_path(folder, asked)
    for shard in range(asked.num_shards):
        ask_shard(corpus, folder, service, asked, shard, progress)
    return merge(folder, asked, partial(names_of, corpus))


def is_written(folder: Path, asked: Asked) -> bool:
    """Whether this question is answered for good: then nobody is asked."""
    try:
        said = json.loads(description_path(folder, asked).read_text())["asked"]
    except (FileNotFoundError, ValueError, KeyError):
        return False
    same = all(said.get(name) == value for name, value in asdict(asked).items() if name != "num_shards")
    return same and neighbors_path(folder, asked).is_file()


def ask_shard(corpus: Path, folder: Path, service: Service, asked: Asked, shard: int, progress: Progress) -> Path:
    """Ask for the neighbors of one shard's pairs. An interrupted shard goes on; a finished one is kept, unless the
    knowledge base has changed since.

    Raises:
        LookupFailed: the service cannot be reached, or the knowledge base changed meanwhile.
        CorpusError: the corpus cannot be read.
        ShardError: another process asks this shard.
    """
    rows, home = asked.rows(shard), folder / "knn" / asked.folder_name
    path = home / f"shard-{shard:05d}.safetensors"
    lookup = Lookup(service, knowledge_base=asked.knowledge_base, method=asked.method, count=asked.count)
    with lookup, _alone(home, shard):
        index = lookup.index_now()
        if path.is_file() and read_header(path).index == index:
            return path
        parts = Parts(home / f"parts-{shard:05d}", asked, index)
        first = parts.after(rows.start)
        if first > rows.start:
            log.info("shard %d goes on from pair %d of %d to %d", shard, first, rows.start, rows.stop)
        for pairs in _batches(iter_rows(corpus, range(first, rows.stop)), PART_PAIRS):
            _ask_part(lookup, asked, parts, first, pairs)
            first += len(pairs)
            progress(f"neighbors, shard {shard}", first - rows.start, len(rows))
        headers, arrays = zip(*parts, strict=True)
        whole = Header(
            asked=asked,
            index=index,
            first=rows.start,
            last=rows.stop,
            seconds=round(sum(h.seconds for h in headers), 3),
            reasons=dict(item for h in headers for item in h.reasons.items()),
        )
        write(path, whole, joined(arrays))
        parts.remove()
    return path


def iter_rows(corpus: Path, rows: range) -> Iterator[Pair]:
    """The pairs of these rows in order; shards of the corpus that hold none of them are not read.

    Raises:
        CorpusError: a shard does not hold as many pairs as the manifest says, and see `iter_pairs`.
    """
    start = 0
    for shard in read_manifest(corpus).shards:
        stop = start + int(shard["num_pairs"])
        if start < rows.stop and stop > rows.start:
            num = 0
            for num, pair in enumerate(iter_shard(corpus, shard), start=1):
                if start + num - 1 in rows:
                    yield pair
            if start + num != stop:
                raise CorpusError(f"corpus: shard {shard['file']} of {corpus} holds {num} pairs, not {stop - start}")
        start = stop


def names_of(corpus: Path, rows: list[int]) -> dict[int, tuple[str, str]]:
    """(pair id, caption) of some pairs."""
    found: dict[int, tuple[str, str]] = {}
    for row in sorted(rows):
        pair = next(iter_rows(corpus, range(row, row + 1)))
        found[row] = (retrieval_id(pair), pair.caption)
    return found


def _ask_part(lookup: Lookup, asked: Asked, parts: Parts, first: int, pairs: list[Pair]) -> None:
    started = time.perf_counter()
    answers = lookup.ask([_question(pair) for pair in pairs])
    refused = [(retrieval_id(p), a.refused) for p, a in zip(pairs, answers, strict=True) if a.refused]
    header = Header(
        asked=asked,
        index=lookup.index,
        first=first,
        last=first + len(pairs),
        seconds=time.perf_counter() - started,
        reasons=dict(refused[:NUM_REASONS]),
    )
    parts.add(header, neighborhoods(pairs, answers, asked.count))


def _question(pair: Pair) -> Question:
    return Question(pair_id=retrieval_id(pair), caption=pair.caption, content=hashlib.sha256(pair.image).hexdigest())


def _batches(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    stream = iter(pairs)
    while batch := list(islice(stream, size)):
        yield batch


@contextmanager
def _alone(home: Path, shard: int) -> Iterator[None]:
    """Hold the shard: two processes would remove each other's parts."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".shard-{shard:05d}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"shard: {shard} is being asked by another process") from None
        yield
