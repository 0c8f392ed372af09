"""Synthetic pairs of any number: captions with the word distribution of language, vectors that come in clusters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

EMBEDDING_SIZE = 512
VOCABULARY = 200_000
ZIPF_EXPONENT = 1.1  # of word frequencies (Zipf-Mandelbrot; English is near 1)
ZIPF_SHIFT = 2.7
WORDS = (2, 9)  # of an entity, fewest and most
CLUSTER_PAIRS = 50  # pairs of a cluster, on average
SPREAD = 0.6  # of a cluster's vectors, against the length 1 of its centre
BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Block:
    """Pairs `first` and on: entity words, and embeddings float32 [N, EMBEDDING_SIZE] of unit length."""

    first: int
    entities: list[str]
    embeddings: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Question:
    """A lookup: words of some pair's entity, and a vector near that pair's."""

    words: str
    embedding: np.ndarray


def word(rank: int) -> str:
    """The word of a frequency rank: letters alone, so that every tokenizer agrees on it, and no two with one stem."""
    letters, left = [], rank + 26**3
    while left:
        left, digit = divmod(left, 26)
        letters.append(chr(ord("a") + digit))
    return "".join(letters) + "x"


class Corpus:
    """`count` pairs, the same for the same seed, made block by block."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count = count
        self._seed = seed
        rng = np.random.default_rng([seed, 0])
        centres = rng.standard_normal((max(1, count // CLUSTER_PAIRS), EMBEDDING_SIZE), dtype=np.float32)
        self._centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        weights = 1.0 / (np.arange(VOCABULARY) + ZIPF_SHIFT) ** ZIPF_EXPONENT
        self._cumulative = np.cumsum(weights / weights.sum())
        self._words = [word(rank) for rank in range(VOCABULARY)]

    def blocks(self) -> Iterator[Block]:
        """All pairs."""
        for first in range(0, self.count, BLOCK):
            yield self._block(first)

    def _block(self, first: int) -> Block:
        rng = np.random.default_rng([self._seed, 1, first])
        size = min(BLOCK, self.count - first)
        lengths = rng.integers(WORDS[0], WORDS[1] + 1, size)
        ranks = np.searchsorted(self._cumulative, rng.random(int(lengths.sum())))
        ends = np.cumsum(lengths)
        entities = [
            " ".join(self._words[rank] for rank in ranks[end - length : end])
            for end, length in zip(ends, lengths, strict=True)
        ]
        return Block(
            first=first, entities=entities, embeddings=self._near(rng, rng.integers(len(self._centres), size=size))
        )

    def questions(self, count: int) -> list[Question]:
        """Lookups for pairs drawn at random: three to six of a pair's words, and a vector of a cluster."""
        rng = np.random.default_rng([self._seed, 2])
        block = self._block(int(rng.integers(max(1, self.count // BLOCK))) * BLOCK)
        vectors = self._near(rng, rng.integers(len(self._centres), size=count))
        questions = []
        for vector in vectors:
            words = block.entities[int(rng.integers(len(block.entities)))].split()
            chosen = rng.permutation(words)[: int(rng.integers(3, 7))]
            questions.append(Question(words=" ".join(chosen), embedding=vector))
        return questions

    def _near(self, rng: np.random.Generator, clusters: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal((len(clusters), EMBEDDING_SIZE), dtype=np.float32) / np.sqrt(EMBEDDING_SIZE)
        vectors = self._centres[clusters] + SPREAD * noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
