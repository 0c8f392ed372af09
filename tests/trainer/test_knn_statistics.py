"""The figures of KNN-ImageText, against SciPy and counts by hand; the merge on shards made by hand; the page."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import skew

from common.images import decode_rgb
from trainer.knn_merge import description_path, merge, neighbors_path, report_path
from trainer.knn_report import plots
from trainer.knn_shards import NONE, Asked, Header, Neighborhoods, ShardError, id_hash, write
from trainer.knn_statistics import Statistics

NUM, K = 60, 3


def asked(num_shards: int = 2, **changed: Any) -> Asked:
    given: dict[str, Any] = {"corpus": "c" * 64, "num_pairs": NUM, "knowledge_base": "kb", "method": "bm25", "k": K}
    return Asked(**(given | changed), num_shards=num_shards)


def names_of(rows: list[int]) -> dict[int, tuple[str, str]]:
    return {row: (f"pair-{row}", f"caption <{row}>") for row in rows}


def made(question: Asked, seed: int = 0) -> Neighborhoods:
    """Random neighbors of all pairs: some held out, some of no corpus, the pair itself among them, fewer than k for a few."""
    rng = np.random.default_rng(seed)
    ids = np.array([id_hash(f"pair-{i}") for i in range(NUM)], np.uint64)
    neighbors = np.full((NUM, question.count), NONE, np.uint64)
    scores = np.full((NUM, question.count), np.nan, np.float32)
    for i in range(NUM):
        found = rng.permutation(NUM)[: rng.integers(0, min(question.count, 20))]
        neighbors[i, : len(found)] = ids[found]
        if len(found) > 2 and i % 5 == 0:
            neighbors[i, 1] = id_hash("a stranger")
        scores[i, : len(found)] = np.sort(rng.uniform(1, 9, len(found)))[::-1]
    entities = np.array([NONE if i % 7 == 0 else id_hash(f"entity {i % 6}") for i in range(NUM)], np.uint64)
    return Neighborhoods(
        ids=ids,
        entities=entities,
        held_out=np.arange(NUM) % 10 == 3,
        refused=np.arange(NUM) == 4,
        neighbors=neighbors,
        scores=scores,
    )


def put(folder: Path, question: Asked, rows: Neighborhoods, index: str = "i") -> None:
    """Write the shards."""
    for shard in range(question.num_shards):
        own = question.rows(shard)
        part = Neighborhoods(**{name: value[own.start : own.stop] for name, value in vars(rows).items()})
        header = Header(
            asked=question, index=index, first=own.start, last=own.stop, seconds=2.0, reasons={f"pair-{shard}": "why"}
        )
        write(folder / "knn" / question.folder_name / f"shard-{shard:05d}.safetensors", header, part)


def expected(rows: Neighborhoods, k: int = K) -> list[list[int]]:
    """What is to stay, by plain loops."""
    row_of = {int(h): i for i, h in enumerate(rows.ids)}
    kept = []
    for i in range(NUM):
        found = [row_of[int(h)] for h in rows.neighbors[i] if int(h) in row_of]
        kept.append([j for j in found if j != i and (rows.held_out[i] or not rows.held_out[j])][:k])
    return kept


@pytest.mark.parametrize(("num_shards", "k"), [(1, K), (2, 12), (7, 12)])
def test_the_merge_keeps_what_training_may_see(tmp_path: Path, num_shards: int, k: int) -> None:
    question = asked(num_shards, k=k)
    rows = made(question)
    put(tmp_path, question, rows)
    assert merge(tmp_path, question, names_of) == neighbors_path(tmp_path, question)
    nearest = np.load(neighbors_path(tmp_path, question))
    assert nearest.dtype == np.int32 and nearest.shape == (NUM, k)
    assert [[int(j) for j in line if j >= 0] for line in nearest] == expected(rows, k)
    assert {p.suffix for p in (tmp_path / "knn").iterdir() if p.is_file()} == {".npy", ".json", ".html"}


def test_figures(tmp_path: Path) -> None:
    question = asked()
    rows = made(question)
    put(tmp_path, question, rows)
    merge(tmp_path, question, names_of)
    said = json.loads(description_path(tmp_path, question).read_text())["statistics"]
    kept = expected(rows)
    counts = np.bincount([j for line in kept for j in line], minlength=NUM)
    assert said["pairs_by_number_of_neighbors"] == [sum(len(line) == n for line in kept) for n in range(K + 1)]
    assert said["share_without_neighbors"] == round(sum(not line for line in kept) / NUM, 5)
    assert said["share_of_fewer_than_k"] == round(sum(len(line) < K for line in kept) / NUM, 5)
    assert said["hubness"]["k_occurrence_skewness"] == pytest.approx(skew(counts), abs=1e-4)
    assert said["hubness"]["k_occurrence_max"] == counts.max()
    assert said["hubness"]["share_never_a_neighbor"] == round(float((counts == 0).mean()), 5)
    first = said["hubness"]["top"][0]
    assert first["pair_id"] == f"pair-{int(counts.argmax())}" and first["k_occurrence"] == counts.max()
    entity = {i: int(e) for i, e in enumerate(rows.entities)}
    pairs = [(i, j) for i, line in enumerate(kept) for j in line if entity[i] != NONE]
    assert said["same_entity"]["share_of_neighbors"] == round(
        sum(entity[i] == entity[j] for i, j in pairs) / len(pairs), 5
    )
    best = [float(rows.scores[i][list(_rows(rows, i)).index(line[0])]) for i, line in enumerate(kept) if line]
    assert said["best_score"]["p50"] == pytest.approx(np.median(best), abs=1e-3)
    assert said["left_out"]["not_in_corpus"] == int((rows.neighbors == id_hash("a stranger")).sum()) > 0
    assert said["left_out"]["held_out"] > 0 and said["refused_captions"] == 1
    assert said["asking"] == {"shards": 2, "shard_seconds": 4.0, "pairs_per_s_of_a_shard": NUM / 4}


def _rows(rows: Neighborhoods, pair: int) -> list[int]:
    row_of = {int(h): i for i, h in enumerate(rows.ids)}
    return [row_of.get(int(h), -1) for h in rows.neighbors[pair]]


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    question = asked()
    put(tmp_path, question, made(question))
    merge(tmp_path, question, names_of)
    page = report_path(tmp_path, question).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "caption &lt;" in page
    picture = re.search(r"data:image/png;base64,([^\"]+)", page)
    assert picture is not None
    pixels = decode_rgb(base64.b64decode(picture[1]))
    assert min(pixels.shape[:2]) > 500 and pixels.std() > 10


def test_a_corpus_without_entities_or_neighbors_has_a_page_too() -> None:
    statistics = Statistics(asked())
    nothing = np.full((NUM, K), -1, np.int32)
    rows = made(asked())
    none = np.zeros((NUM, K), bool)
    statistics.add(nothing, np.full((NUM, K), np.nan), none, np.zeros(NUM, bool), rows, {"held_out": 0})
    said = statistics.figures([], names_of)
    assert said["share_without_neighbors"] == 1.0 and said["hubness"]["top"] == []
    assert said["same_entity"] == {"pairs_with_entity": 0} and said["best_score"] == {}
    assert plots(statistics).startswith(b"\x89PNG")


def test_ids_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    question = asked()
    rows = made(question)
    rows.ids[9] = rows.ids[41]
    put(tmp_path, question, rows)
    with pytest.raises(ShardError, match="pairs 9 and 41 of the corpus have one id"):
        merge(tmp_path, question, names_of)
    assert not neighbors_path(tmp_path, question).exists()
