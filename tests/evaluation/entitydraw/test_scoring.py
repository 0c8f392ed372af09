"""Scores and figures, of pictures whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.corpus import Pair
from common.files import write_atomic
from common.images import encode_png, enlarge_bicubic
from common.scenes import Scene, all_scenes, caption
from evaluation.ablations.experiment import true_picture
from evaluation.entitydraw.figures import best_of, figures_of, parts_of, run_figures
from evaluation.entitydraw.results import NeighborRow, PictureRow, RunError, RunFolder, ScoreRow
from evaluation.entitydraw.scoring import Galleries, rank, scene_of, score_run, small
from evaluation.entitydraw.suite_file import Suite, SuitePrompt
from evaluation.suite import by_style
from tests.evaluation.entitydraw.conftest import silent

Draw = Callable[[SuitePrompt], np.ndarray]


def made_run(folder: Path, suite: Suite, **systems: Draw) -> RunFolder:
    """A run whose pictures are drawn by functions."""
    run = RunFolder(folder)
    rows = []
    for system, draw in systems.items():
        for prompt in suite.prompts:
            path = run.picture_file(system, prompt.id, 1)
            write_atomic(path, encode_png(draw(prompt)))
            entity = prompt.entity
            rows.append(
                PictureRow(
                    system=system,
                    prompt_id=prompt.id,
                    prompt=prompt.text,
                    category=entity.category,
                    entity=entity.name,
                    frequency=entity.frequency,
                    frequent=entity.frequent,
                    seed=1,
                    file=run.relative(path),
                    sha256="0" * 64,
                )
            )
    run.write_rows(rows)
    return run


def another(suite: Suite) -> Draw:
    """The true picture of another entity's prompt, in this prompt's style and scene."""

    def draw(prompt: SuitePrompt) -> np.ndarray:
        style = prompt.target.facets["style"] if prompt.target else ""
        same = [
            p for p in suite.prompts if p.target and p.target.facets["style"] == style and p.entity != prompt.entity
        ]
        return true_picture(same[0])

    return draw


def test_true_pictures_score_full_and_others_do_not(suite: Suite, galleries: Galleries, tmp_path: Path) -> None:
    blank: Draw = lambda prompt: np.full((64, 64, 3), 255, np.uint8)  # noqa: E731
    large: Draw = lambda prompt: np.kron(true_picture(prompt), np.ones((4, 4, 1), np.uint8))  # noqa: E731
    run = made_run(tmp_path, suite, right=true_picture, wrong=another(suite), blank=blank, large=large)
    scores = score_run(run, suite, galleries, silent)
    figures = run_figures(run.rows(), scores)["systems"]
    for system in ("right", "large"):
        said = figures[system]["all"]
        assert {n: said[n]["estimate"] for n in ("entity_r1", "entity_mrr", "background", "corner", "text")} == {
            "entity_r1": 1.0,
            "entity_mrr": 1.0,
            "background": 1.0,
            "corner": 1.0,
            "text": 1.0,
        }
        assert said["background"]["prompts"] == 6 and said["corner"]["prompts"] == 3, "of prompts that name one"
    wrong = figures["wrong"]["all"]
    assert wrong["entity_r1"]["estimate"] == 0.0 and wrong["text"]["estimate"] == 1.0, "the scene is right"
    assert figures["blank"]["all"]["text"]["estimate"] == 0.0
    assert run.scores() == sorted(scores, key=lambda row: row.key)


def test_what_is_scored_is_not_scored_again_unless_it_has_changed(
    suite: Suite, galleries: Galleries, tmp_path: Path
) -> None:
    run = made_run(tmp_path, suite, right=true_picture)
    first = sorted(score_run(run, suite, galleries, silent), key=lambda r: r.key)
    marked = [replace(row, scores={**row.scores, "entity_r1": 0.5}) for row in first]
    run.write_scores(marked)
    assert sorted(score_run(run, suite, galleries, silent), key=lambda r: r.key) == marked
    run.write_rows(replace(row, sha256="1" * 64) for row in run.rows())
    assert score_run(run, suite, galleries, silent)[0].scores["entity_r1"] == 1.0
    run.write_scores(replace(row, scores={}) for row in first)
    assert score_run(run, suite, galleries, silent)[0].scores["entity_r1"] == 1.0, "rows that lack a score are measured"


def test_a_line_ends_where_it_ends_whatever_a_prompt_holds(suite: Suite, tmp_path: Path) -> None:
    """JSON leaves some characters as they are that other readers take for ends of lines."""
    run = made_run(tmp_path, suite, true=true_picture)
    odd = [replace(row, prompt="a dog\u2028 a\u0085 cat") for row in run.rows()]
    run.write_rows(odd)
    assert run.rows() == odd


def test_without_targets_the_references_of_the_category_are_the_gallery(
    suite: Suite, held_out: list[Pair], tmp_path: Path
) -> None:
    bare = replace(suite, prompts=tuple(replace(prompt, target=None) for prompt in suite.prompts))
    target = {prompt.id: prompt for prompt in suite.prompts}
    on_white: Draw = lambda prompt: true_picture(  # noqa: E731
        replace(target[prompt.id], template="{name}, on a white background")
    )
    run = made_run(tmp_path, bare, right=on_white)
    scores = score_run(run, bare, Galleries(bare, {}), silent)
    assert [row.scores["entity_r1"] for row in scores] == [1.0] * 6
    assert by_style(held_out, min_gallery=4) == {}, "a style of few is no gallery"


def test_a_suite_without_any_picture_has_no_entity_scores(suite: Suite, tmp_path: Path) -> None:
    entities = {entity.name: replace(entity, references=()) for entity in suite.entities}
    prompts = tuple(replace(p, target=None, entity=entities[p.entity.name]) for p in suite.prompts)
    bare = replace(suite, entities=tuple(entities.values()), prompts=prompts)
    targets = {prompt.id: prompt for prompt in suite.prompts}
    run = made_run(tmp_path, bare, some=lambda prompt: true_picture(targets[prompt.id]))
    scores = score_run(run, bare, Galleries(bare, {}), silent)
    assert {row.scores["entity_r1"] for row in scores} == {None}
    assert {row.scores["background"] for row in scores} == {1.0}, "what needs no picture is measured all the same"
    figures = run_figures(run.rows(), scores, order=["some"])
    assert "background" in figures["systems"]["some"]["all"]
    assert not [name for name in figures["systems"]["some"]["all"] if "entity" in name]


def test_a_run_of_another_suite_and_a_broken_picture_are_said(
    suite: Suite, galleries: Galleries, tmp_path: Path
) -> None:
    run = made_run(tmp_path, suite, right=true_picture)
    rows = run.rows()
    (tmp_path / rows[0].file).write_bytes(b"\x89PNG broken")
    with pytest.raises(RunError, match="cannot be read"):
        score_run(run, suite, galleries, silent)
    run.write_rows([replace(rows[1], prompt_id="gone")])
    with pytest.raises(RunError, match="prompt_id 'gone' is not of the suite 'tiny'"):
        score_run(run, suite, galleries, silent)


def test_a_pasted_neighbor_and_the_style_are_told(suite: Suite, galleries: Galleries, tmp_path: Path) -> None:
    run = made_run(tmp_path, suite, right=true_picture, alone=true_picture)
    prompts = {prompt.id: prompt for prompt in suite.prompts}

    def beside(row: PictureRow) -> PictureRow:
        target = prompts[row.prompt_id].target
        assert target is not None
        file = run.keep_reference(target.image, "svg")
        sha256 = file.removeprefix("references/").removesuffix(".svg")
        said = NeighborRow(pair_id="p", caption="", entity="guide dog", file=file, sha256=sha256, is_reference=False)
        return replace(row, neighbors=(said,) if row.system == "right" else ())

    run.write_rows([beside(row) for row in run.rows()])
    scores = score_run(run, suite, galleries, silent, lambda pictures: ["noto"] * len(pictures))
    figures = run_figures(run.rows(), scores)["systems"]
    assert figures["right"]["all"]["near_copy"]["estimate"] == 1.0 and "near_copy" not in figures["alone"]["all"]
    assert figures["alone"]["all"]["style"]["estimate"] == 0.5, "three of six ask for noto"
    assert figures["right"]["all"]["neighbors_right"]["estimate"] == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize("scene", all_scenes())
def test_the_scene_that_a_prompt_ends_with(scene: Scene) -> None:
    assert scene_of(caption("guide dog, brown", "noto", scene)) == scene


def test_a_prompt_without_a_scene_has_none() -> None:
    assert scene_of("a guide dog in the park") is None


def test_equal_ones_count_against_the_entity() -> None:
    assert rank({"a": 0.5, "b": 0.5, "c": 0.1}, "a") == 2
    assert rank({"a": 0.5}, "z") is None


def test_pictures_of_any_size_are_judged_at_one() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    assert (small(np.kron(picture, np.ones((2, 2, 1), np.uint8))) == picture).all()
    assert small(enlarge_bicubic(picture, 100)).shape == (64, 64, 3)


def row(system: str, prompt: str, seed: int, rr: float, **scores: float | None) -> ScoreRow:
    """Scores of one picture."""
    known = {"entity_r1": float(rr == 1.0), "entity_r5": float(rr >= 0.2), "entity_rr": rr}
    return ScoreRow(system=system, prompt_id=prompt, seed=seed, sha256="", scores={**known, **scores})


def test_the_best_of_a_prompts_pictures_is_judged() -> None:
    scores = [
        row("s", "a", 1, 0.1),
        row("s", "a", 2, 1.0),
        row("s", "b", 1, 0.5),
        row("s", "b", 2, 0.5, entity_likeness=0.9),
    ]
    assert {r.prompt_id: r.seed for r in best_of(scores)} == {"a": 2, "b": 2}
    figures = figures_of(scores)
    assert figures["entity_r1"]["estimate"] == 0.25 and figures["best_entity_r1"]["estimate"] == 0.5
    assert figures["entity_mrr"]["estimate"] == pytest.approx(0.525) and figures["entity_r1"]["prompts"] == 2
    assert "background" not in figures, "what no prompt names is no figure"


def test_systems_are_compared_on_the_pictures_that_both_have(suite: Suite) -> None:
    first = [row("x", f"p{i}", 1, 1.0, background=1.0) for i in range(8)]
    second = [row("y", f"p{i}", 1, 0.5, background=1.0) for i in range(6)]
    said = run_figures([], [*first, *second])["comparisons"]
    assert [(c["first"], c["second"]) for c in said] == [("x", "y")]
    assert said[0]["entity_r1"]["difference"]["estimate"] == 1.0 and said[0]["entity_r1"]["better"] == 6
    assert said[0]["entity_r1"]["p_sign"] == pytest.approx(2 / 2**6, abs=1e-5)
    assert said[0]["text"]["tied"] == 6
    assert run_figures([], [*first, *second], [])["comparisons"] == []


def test_parts_are_categories_and_frequency(tmp_path: Path, suite: Suite) -> None:
    parts = parts_of(made_run(tmp_path, suite, right=true_picture).rows())
    assert parts["category/things"] == {p.id for p in suite.prompts}
    assert parts["infrequent"] == {"steam-locomotive-1", "steam-locomotive-2"} and len(parts["frequent"]) == 4
