"""From finished shards to what training reads: ids become rows, held-out neighbors go, k of each pair stay."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.files import sync_folder, write_atomic, write_json
from trainer.knn_report import html_report
from trainer.knn_shards import NONE, Asked, Header, Neighborhoods, ShardError, read, read_header
from trainer.knn_statistics import Statistics

NamesOf = Callable[[list[int]], dict[int, tuple[str, str]]]
"""Rows -> (pair id, caption) of each."""


def neighbors_path(folder: Path, asked: Asked) -> Path:
    """What training reads: int32 [num_pairs, k], rows of the corpus, best first, -1 where there are fewer."""
    return folder / "knn" / f"{asked.corpus}.npy"


def description_path(folder: Path, asked: Asked) -> Path:
    """What was asked of which index, and the statistics."""
    return folder / "knn" / f"{asked.corpus}.json"


def report_path(folder: Path, asked: Asked) -> Path:
    """The statistics as a page with plots."""
    return folder / "knn" / f"{asked.corpus}.html"


def merge(folder: Path, asked: Asked, names_of: NamesOf) -> Path:
    """Write `neighbors_path`, `description_path` and `report_path` from the shards under `folder`.

    A training pair gets no held-out neighbor, so that no held-out picture is seen in training; neighbors that are not in
    the corpus are left out, as they cannot be trained on.

    Raises:
        ShardError: a shard is missing or damaged, answers another question, another corpus or another index; or no
            neighbor at all is of this corpus.
    """
    paths = [folder / "knn" / asked.folder_name / f"shard-{i:05d}.safetensors" for i in range(asked.num_shards)]
    headers = _checked(paths, asked)
    corpus = _Corpus(paths)
    statistics = Statistics(asked)
    target = neighbors_path(folder, asked)
    with _array(target, (asked.num_pairs, asked.k)) as rows:
        for path in paths:
            header, shard = read(path)
            kept, scores, dropped = corpus.resolve(shard, header.first, asked.k)
            rows[header.first : header.last] = kept
            same = corpus.same_entity(kept, header.first)
            statistics.add(kept, scores, same, corpus.entities[header.first : header.last] != NONE, shard, dropped)
        document = {
            "asked": asdict(asked),
            "index": headers[0].index,
            "statistics": statistics.figures(headers, names_of),
        }
        if not statistics.num_neighbors and statistics.dropped["not_in_corpus"]:
            raise ShardError(
                f"knn: none of the neighbors is of this corpus: knowledge base {asked.knowledge_base!r} holds another"
            )
    write_atomic(report_path(folder, asked), html_report(document["statistics"], statistics))
    write_json(description_path(folder, asked), document)
    return target


def _checked(paths: list[Path], asked: Asked) -> list[Header]:
    missing = [str(i) for i, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise ShardError(f"knn: shards {', '.join(missing)} of {asked.num_shards} are not there in {paths[0].parent}")
    headers = [read_header(path) for path in paths]
    for i, (path, header) in enumerate(zip(paths, headers, strict=True)):
        if header.asked != asked:
            raise ShardError(f"knn: {path} answers another question ({header.asked}, not {asked})")
        if range(header.first, header.last) != asked.rows(i):
            raise ShardError(f"knn: {path} holds pairs {header.first} to {header.last}, not {asked.rows(i)}")
    indexes = {header.index: [i for i, h in enumerate(headers) if h.index == header.index] for header in headers}
    if len(indexes) > 1:
        said = "; ".join(f"{index[:12]}…: shards {', '.join(map(str, of))}" for index, of in indexes.items())
        raise ShardError(f"knn: the knowledge base changed between shards ({said}): ask those of the older index again")
    return headers


class _Corpus:
    """All pairs of the corpus by the hashes of their ids; 25 bytes a pair."""

    def __init__(self, paths: list[Path]) -> None:
        told = [(shard.ids, shard.entities, shard.held_out) for _, shard in map(read, paths)]
        ids, self.entities, self.held_out = (np.concatenate(parts) for parts in zip(*told, strict=True))
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            both = sorted(int(row) for row in self._order[twice[0] : twice[0] + 2])
            raise ShardError(f"knn: pairs {both[0]} and {both[1]} of the corpus have one id")

    def resolve(self, shard: Neighborhoods, first: int, k: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Rows int32 [n, k] and scores float32 [n, k] of the neighbors that stay, and how many were left out why."""
        own = np.arange(first, first + len(shard.ids))
        there = shard.neighbors != NONE
        place = np.searchsorted(self._sorted, shard.neighbors).clip(max=len(self._sorted) - 1)
        known = there & (self._sorted[place] == shard.neighbors)
        rows = np.where(known, self._order[place], -1)
        hidden = known & self.held_out[rows] & ~self.held_out[own][:, None]
        stays = known & ~hidden & (rows != own[:, None])
        best = np.argsort(~stays, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(np.where(stays, rows, -1), best, axis=1).astype(np.int32)
        scores = np.where(kept >= 0, np.take_along_axis(shard.scores, best, axis=1), np.nan)
        return kept, scores, {"held_out": int(hidden.sum()), "not_in_corpus": int((there & ~known).sum())}

    def same_entity(self, kept: np.ndarray, first: int) -> np.ndarray:
        """Whether a neighbor shows the pair's own entity [n, k]; false where either is not known."""
        own = self.entities[first : first + len(kept)][:, None]
        return (kept >= 0) & (self.entities[kept] == own) & (own != NONE)


class _array:
    """An array on disk that takes `path`'s place when the block ends well."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self._shape = path, shape

    def __enter__(self) -> np.ndarray:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.", suffix=".part")
        os.close(handle)
        self._temporary = Path(name)
        self._array = np.lib.format.open_memmap(self._temporary, mode="w+", dtype=np.int32, shape=self._shape)
        return self._array

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        self._array.flush()
        os.chmod(self._temporary, 0o644)
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
