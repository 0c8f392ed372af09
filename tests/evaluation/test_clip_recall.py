"""Recall of a dual encoder, on a small corpus and with an embedder whose answers are known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.corpus import Pair, write_corpus
from common.dual_encoder import load_dual_encoder
from common.images import decode_rgb
from common.scenes import Scene
from evaluation.clip_recall import (
    evaluate_clip,
    galleries,
    ranks,
    recall_figures,
    seen_in_training,
    told_words,
    write_clip_results,
)
from tests.trainer.shapes import shape_pairs

ROOT = Path(__file__).parents[2]
HELD_OUT = {"red circle", "blue circle", "green square"}


class FakeColorEmbedder:
    """Pictures by their mean color; texts by what `known` gives: the picture of the text, or nothing."""

    name, size, image_side = "colors", 3, 8

    def __init__(self, known: dict[str, np.ndarray]) -> None:
        self.known = known

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        blind = np.array([1.0, 0.0, 0.0], np.float32)
        return np.stack([self._vector(self.known[t]) if t in self.known else blind for t in texts])

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([self._vector(image) for image in images])

    @staticmethod
    def _vector(picture: np.ndarray) -> np.ndarray:
        mean = picture.mean((0, 1)).astype(np.float32) - 128.0 + np.float32(1e-3)
        return mean / np.linalg.norm(mean)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [replace(pair, held_out=pair.entity in HELD_OUT) for pair in shape_pairs()]


@pytest.fixture(scope="module")
def corpus(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "corpus"
    write_corpus(folder, pairs, name="tiny", version="1")
    return folder


def silent(task: str, done: int, total: int) -> None:
    assert 0 < done <= total


def test_galleries_hold_each_held_out_entity_once(corpus: Path, pairs: list[Pair]) -> None:
    found = galleries(corpus, 3)
    styles = {pair.facets["style"] for pair in pairs}
    assert set(found) == {"scenes", "names", *(f"one_style/{style}" for style in styles)}
    for name, gallery in found.items():
        assert {item.pair.entity for item in gallery} == HELD_OUT and len(gallery) == 3
        assert all(item.pair.held_out for item in gallery)
        if name.startswith("one_style/"):
            assert {item.pair.facets["style"] for item in gallery} == {name.removeprefix("one_style/")}
            assert {item.scene for item in gallery} == {Scene()}, "the scene must tell nothing"
    assert [item.text for item in found["names"]] == [item.pair.entity for item in found["names"]]
    assert found == galleries(corpus, 3)


def test_the_order_of_the_corpus_does_not_matter(corpus: Path, pairs: list[Pair], tmp_path: Path) -> None:
    write_corpus(tmp_path / "turned", pairs[::-1], name="tiny", version="1")
    first, second = galleries(corpus, 2), galleries(tmp_path / "turned", 2)
    assert {n: [i.text for i in g] for n, g in first.items()} == {n: [i.text for i in g] for n, g in second.items()}


def test_too_few_held_out_entities_are_said(corpus: Path) -> None:
    with pytest.raises(ValueError, match="3 held-out entities, 4 are asked for"):
        galleries(corpus, 4)


def test_equal_scores_do_not_count_as_found() -> None:
    same = np.ones((4, 2), np.float32)
    assert ranks(same, same).tolist() == [4, 4, 4, 4], "a model that says the same of everything has found nothing"
    eye = np.eye(3, dtype=np.float32)
    assert ranks(eye, eye).tolist() == [1, 1, 1]
    assert ranks(eye[[1, 0, 2]], eye).tolist() == [3, 3, 1]


def test_recall_is_the_share_of_ranks_within_the_cutoff() -> None:
    assert recall_figures(np.array([1, 2, 5, 6, 10, 11])) == {
        "recall_1": 0.1667,
        "recall_5": 0.5,
        "recall_10": 0.8333,
        "median_rank": 5.5,
    }


def test_an_embedder_that_knows_scores_full_and_a_blind_one_does_not(corpus: Path, tmp_path: Path) -> None:
    known = {item.text: item.picture() for gallery in galleries(corpus, 3).values() for item in gallery}
    knowing, sheet = evaluate_clip(FakeColorEmbedder(known), corpus, silent, 3)
    blind, _ = evaluate_clip(FakeColorEmbedder({}), corpus, silent, 3)
    assert knowing["one_style_text_to_image_recall_1"] == knowing["one_style_image_to_text_recall_1"] == 1.0
    assert knowing["one_style_text_to_image_median_rank"] == 1.0
    assert blind["one_style_text_to_image_recall_1"] < 0.5
    assert blind["one_style_image_to_text_recall_1"] == 0.0
    assert knowing["one_style_queries_new_words"] == 9, "three styles of three, none said otherwise in training"
    assert knowing["one_style_text_to_image_recall_10_new_words"] == 1.0
    write_clip_results(tmp_path, knowing, sheet)
    written = json.loads((tmp_path / "clip.json").read_text())
    assert written == knowing and all(isinstance(v, int | float | str) for v in written.values()), "flat figures"
    assert decode_rgb((tmp_path / "clip.png").read_bytes()).shape == sheet.shape


def test_a_name_said_otherwise_is_known(corpus: Path) -> None:
    assert told_words("flag for Kenya") == told_words("flag kenya 2") != told_words("flag of chile")
    seen = seen_in_training(corpus)
    assert told_words("orange square") in seen and told_words("red circle") not in seen


def test_the_card_gives_the_measured_figures_of_the_weights_that_are_there() -> None:
    figures = json.loads((ROOT / "evaluation" / "results" / "clip.json").read_text())
    card = (ROOT / "weights" / "README.md").read_text()
    said = {name: float(v) for name, v in re.findall(r"^\| `(\w+)` \| ([\d.]+) \| .+ \|$", card, re.MULTILINE)}
    assert {name: figures[name] for name in said} == said and len(said) >= 8
    _, digest, _ = load_dual_encoder(ROOT / "weights" / "clip")
    assert figures["model"] == f"clip-{digest[:12]}"
    assert figures["one_style_text_to_image_recall_10"] >= 0.6


def test_all_weights_together_fit_their_budget() -> None:
    files = [path for path in (ROOT / "weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30 * 2**20
