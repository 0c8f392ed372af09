"""Neighbors of a range of pairs on disk, and the parts that an interrupted shard goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.corpus import Pair
from common.files import write_atomic
from trainer.knn_corpus import corpus_key
from trainer.knn_lookup import MAX_ASKED, METHODS, Answer

_HEADER = "reimagen"
NONE = 0  # the hash that stands for no id


class ShardError(ValueError):
    """Shards are missing, damaged, or not of one another; the message names them."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of whom: shards of one set agree in all of it.

    Attributes:
        corpus: its fingerprint. num_pairs: of the corpus.
        knowledge_base: empty where the service holds one only.
        method: one of `knn_lookup.METHODS`.
        k: neighbors that a pair is to have.
        num_shards: parts into which the corpus' pairs are cut.
    """

    corpus: str
    num_pairs: int
    knowledge_base: str
    method: str
    k: int
    num_shards: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is not one of {METHODS}")
        if not 1 <= self.k <= MAX_ASKED // 2:
            raise ValueError(f"k: {self.k} is not between 1 and {MAX_ASKED // 2}")
        if not 1 <= self.num_shards <= max(1, self.num_pairs):
            raise ValueError(f"shards: {self.num_shards} is not between 1 and the corpus' {self.num_pairs} pairs")

    @property
    def count(self) -> int:
        """Neighbors asked for: more than k, since held-out pairs and those of no corpus are left out afterwards."""
        return min(MAX_ASKED, max(2 * self.k, self.k + 8))

    @property
    def folder_name(self) -> str:
        base = self.knowledge_base or "only"
        return f"{self.corpus[:12]}-{base}-{self.method}-k{self.k}-of-{self.num_shards}"

    def rows(self, shard: int) -> range:
        """The pairs of a shard.

        Raises:
            ValueError: there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard: {shard} is not between 0 and {self.num_shards - 1}")
        return range(self.num_pairs * shard // self.num_shards, self.num_pairs * (shard + 1) // self.num_shards)


@dataclass(frozen=True, kw_only=True)
class Neighborhoods:
    """Neighbors of n consecutive pairs. Ids are 64-bit hashes: a shard needs nothing of the pairs outside of it.

    Attributes:
        ids: of the pairs, uint64 [n].
        entities: hashes of the pairs' entities, NONE where it is not known, uint64 [n].
        held_out: bool [n].
        refused: whether the caption was no question, bool [n].
        neighbors: ids, best first, NONE where there are fewer, uint64 [n, count].
        scores: float32 [n, count].
    """

    ids: np.ndarray
    entities: np.ndarray
    held_out: np.ndarray
    refused: np.ndarray
    neighbors: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself.

    Attributes:
        asked: what was asked. index: fingerprint of the index that answered.
        first, last: the rows it holds are first to last - 1.
        seconds: that asking took.
        reasons: example of a refused caption's reason by pair id, a few.
    """

    asked: Asked
    index: str
    first: int
    last: int
    seconds: float
    reasons: dict[str, str]


def id_hash(name: str) -> int:
    """64 bits that name an id; never NONE. Two of 50 million ids are alike with probability 7e-5: `merge` finds out."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") or 1


def retrieval_id(pair: Pair) -> str:
    """The id that the knowledge base has for a pair: its key, unless the corpus was made from a knowledge base."""
    given = str(pair.extra.get("pair_id", ""))
    return given if given and corpus_key(given) == pair.key else pair.key  # a corpus may call anything else pair_id


def neighborhoods(pairs: Sequence[Pair], answers: Sequence[Answer], count: int) -> Neighborhoods:
    """Pairs and their answers as arrays."""
    neighbors = np.full((len(pairs), count), NONE, np.uint64)
    scores = np.full((len(pairs), count), np.nan, np.float32)
    for row, answer in enumerate(answers):
        for place, (pair_id, score) in enumerate(answer.neighbors):
            neighbors[row, place] = id_hash(pair_id)
            scores[row, place] = score
    return Neighborhoods(
        ids=np.array([id_hash(retrieval_id(p)) for p in pairs], np.uint64),
        entities=np.array([id_hash(p.entity) if p.entity else NONE for p in pairs], np.uint64),
        held_out=np.array([p.held_out for p in pairs], bool),
        refused=np.array([bool(a.refused) for a in answers], bool),
        neighbors=neighbors,
        scores=scores,
    )


def joined(parts: Sequence[Neighborhoods]) -> Neighborhoods:
    """Parts end to end."""
    return Neighborhoods(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Neighborhoods)})


def write(path: Path, header: Header, rows: Neighborhoods) -> None:
    """Write atomically, as safetensors."""
    tensors = {f.name: np.ascontiguousarray(getattr(rows, f.name)) for f in fields(Neighborhoods)}
    write_atomic(path, save(tensors, {_HEADER: json.dumps(asdict(header))}))


def read_header(path: Path) -> Header:
    """What the file says of itself.

    Raises:
        ShardError: it is damaged, or no such file.
    """
    return _opened(path)[0]


def read(path: Path) -> tuple[Header, Neighborhoods]:
    """The whole file; see `read_header`."""
    header, stream = _opened(path)
    try:
        return header, Neighborhoods(**{f.name: stream.get_tensor(f.name) for f in fields(Neighborhoods)})
    except SafetensorError as error:
        raise ShardError(f"knn: {path} is damaged ({error}); remove it and ask its shard again") from None


def _opened(path: Path) -> tuple[Header, Any]:
    try:
        stream = safe_open(path, "numpy")
        document = json.loads(stream.metadata()[_HEADER])
        return Header(**document | {"asked": Asked(**document["asked"])}), stream
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ShardError(f"knn: {path} is damaged ({error}); remove it and ask its shard again") from None


class Parts:
    """The finished parts of a shard that is still being asked, in a folder of its own."""

    def __init__(self, folder: Path, asked: Asked, index: str) -> None:
        """Finds the parts that are of this question and this index; removes what is of another, or damaged."""
        self.folder = folder
        self._found: dict[int, tuple[Path, Header]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                header = read_header(path)
            except ShardError:
                header = None
            if header is None or header.asked != asked or header.index != index:
                path.unlink()
            else:
                self._found[header.first] = (path, header)

    def after(self, row: int) -> int:
        """The first row from `row` on that no part holds."""
        while row in self._found:
            row = self._found[row][1].last
        return row

    def add(self, header: Header, rows: Neighborhoods) -> None:
        """Store a part."""
        path = self.folder / f"{header.first:012d}.safetensors"
        write(path, header, rows)
        self._found[header.first] = (path, header)

    def __iter__(self) -> Iterator[tuple[Header, Neighborhoods]]:
        """In the order of their rows."""
        for first in sorted(self._found):
            yield read(self._found[first][0])

    def remove(self) -> None:
        """Remove all parts."""
        for path, _ in self._found.values():
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()
