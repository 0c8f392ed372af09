"""The evaluation of the demonstration, whole, on a tiny cascade and a small corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.corpus import Facet, Pair, write_corpus
from common.images import decode_rgb
from common.scenes import scene_phrases
from evaluation.cascade import Cascade, neighbor_picture
from evaluation.demo import Size, evaluate_demo, write_results
from evaluation.suite import Suite, demo_suite
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.pairs import NewPair
from retrieval_svc.retrieval import Query
from tests.generator_svc.tiny_stack import STYLES, make_pairs, write_weights

FLOORS = (
    "entity_r1",
    "entity_r1_without_neighbors",
    "background_accuracy",
    "sr256_db_over_bicubic",
    "sr1024_db_over_bicubic",
    "color_drift",
    "edge_width_px",
)


def held_out_pairs() -> list[Pair]:
    """Three of the four entities are held out."""
    return [replace(pair, held_out=pair.entity != "old oak tree") for pair in make_pairs()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "corpus"
    write_corpus(folder, held_out_pairs(), name="tiny", version="1")
    return folder


@pytest.fixture(scope="module")
def suite(corpus: Path) -> Suite:
    return demo_suite(corpus, 9, min_gallery=3)


def test_the_suite_asks_for_held_out_entities_only(suite: Suite, corpus: Path) -> None:
    assert {prompt.target.entity for prompt in suite.prompts} == {"guide dog", "red apple", "steam locomotive"}
    assert len({prompt.target.key for prompt in suite.prompts}) == 9
    assert suite.smallest_gallery == 3
    assert [p.text for p in demo_suite(corpus, 9, min_gallery=3).prompts] == [p.text for p in suite.prompts]
    for prompt in suite.prompts:
        assert prompt.text.startswith(f"{prompt.target.entity}, {prompt.target.facets['style']} style, ")


def test_more_prompts_than_there_are_is_an_error(corpus: Path) -> None:
    with pytest.raises(ValueError, match="prompts: 10 asked for, the corpus has 9"):
        demo_suite(corpus, 10, min_gallery=3)


@pytest.fixture(scope="module")
def knowledge_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBase]:
    """The pairs of the corpus, opened."""
    style = Facet(name="style", template="{value} style", values=STYLES)
    folder = tmp_path_factory.mktemp("knowledge-base") / "tiny"
    with closing(KnowledgeBase.create(folder, facets=(style,), scene_phrases=scene_phrases())) as made:
        made.upsert(
            [
                NewPair(pair_id=p.key, caption=p.caption, image=p.image, entity=p.entity, facets=p.facets)
                for p in held_out_pairs()
            ]
        )
        made.catch_up()
        yield made


def test_every_figure_is_measured_and_written(suite: Suite, knowledge_base: KnowledgeBase, tmp_path: Path) -> None:
    cascade = Cascade.load(write_weights(tmp_path / "weights"))
    size = Size(prompts=9, enlarged_256=1, enlarged_1024=1, whole=1)
    figures, sheet = evaluate_demo(suite, knowledge_base, cascade, size, lambda task, done, total: None)
    write_results(tmp_path / "results", figures, sheet)
    written = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert set(FLOORS) <= set(written)
    assert all(isinstance(value, int | float) for value in written.values()), "flat"
    assert written["retrieval_two_right"] == 1.0
    assert written["prompts"] == 9
    assert decode_rgb((tmp_path / "results" / "demo.png").read_bytes()).shape == sheet.shape


def test_the_pair_asked_for_is_not_among_the_neighbors(suite: Suite, knowledge_base: KnowledgeBase) -> None:
    for prompt in suite.prompts:
        found = knowledge_base.retrieve(Query(prompt=prompt.text, k=2, exclude_exact=True))
        assert {n.pair.entity for n in found.neighbors} == {prompt.target.entity}
        assert prompt.target.key not in {n.pair.pair_id for n in found.neighbors}


def test_pictures_do_not_depend_on_how_prompts_are_batched(
    suite: Suite, knowledge_base: KnowledgeBase, tmp_path: Path
) -> None:
    cascade = Cascade.load(write_weights(tmp_path / "weights"), sizes=(64,))
    texts = [p.text for p in suite.prompts]
    found = [knowledge_base.retrieve(Query(prompt=text, k=2)).neighbors for text in texts]
    together = cascade.draw_64(texts, found, seed=3)
    alone = cascade.draw_64(texts[:1], found[:1], seed=3)
    assert np.abs(together[0].astype(int) - alone[0].astype(int)).max() <= 1
    assert neighbor_picture(found[0][0], 64).shape == (64, 64, 3)
