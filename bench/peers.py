"""What others answer the same questions with, in this process: bm25s, rank_bm25, exact NumPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
from rank_bm25 import BM25Okapi

from bench.synthetic import Question

RANK_BM25_PAIRS = 20_000  # it scores every pair in Python: more would take minutes a hundred questions
SECONDS = 5.0


def _timed(ask: Callable[[Question], object], questions: Sequence[Question]) -> dict[str, float]:
    took, began = [], time.perf_counter()
    for question in questions:
        started = time.perf_counter()
        ask(question)
        took.append(time.perf_counter() - started)
        if time.perf_counter() - began > SECONDS:
            break
    milliseconds = np.array(took) * 1e3
    return {
        "qps": round(1e3 / float(milliseconds.mean()), 1),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 2),
        "p99_ms": round(float(np.percentile(milliseconds, 99)), 2),
    }


def bm25_peers(entities: Sequence[str], questions: Sequence[Question], k: int) -> dict[str, dict[str, float]]:
    """bm25s, and rank_bm25 where the corpus is small enough for it."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(entities), show_progress=False), show_progress=False)

    def ask_bm25s(question: Question) -> object:
        tokens = bm25s.tokenize([question.words], show_progress=False)
        return index.retrieve(tokens, k=k, show_progress=False)

    measured = {"bm25s": _timed(ask_bm25s, questions)}
    if len(entities) <= RANK_BM25_PAIRS:
        okapi = BM25Okapi([entity.split() for entity in entities])
        measured["rank_bm25"] = _timed(lambda q: np.argpartition(-okapi.get_scores(q.words.split()), k), questions)
    return measured


def exact_numpy(embeddings: np.ndarray, questions: Sequence[Question], k: int) -> dict[str, float]:
    """Every vector compared."""
    return _timed(lambda q: np.argpartition(-(embeddings @ q.embedding), k), questions)
