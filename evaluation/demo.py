"""The demonstration weights measured: does retrieval draw entities that the weights have never seen?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_atomic, write_json
from common.images import contact_sheet, encode_png, enlarge_bicubic, shrink
from common.scenes import Scene
from common.stages import stage
from evaluation.cascade import Cascade, guided_by_text, neighbor_picture
from evaluation.features import background_color, entity_features, psnr, quarter_of, rank_of
from evaluation.scores.color_drift import color_drift
from evaluation.scores.edge_width import edge_widths
from evaluation.suite import Prompt, Suite
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.retrieval import Neighbor, Query

SEED = 7
K = 2
SHEET_ROWS = 20
COPYING = "_copying_a_neighbor"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many pictures each figure is measured on."""

    prompts: int = 200
    enlarged_256: int = 48
    enlarged_1024: int = 12
    whole: int = 24


def evaluate_demo(
    suite: Suite, knowledge_base: KnowledgeBase, cascade: Cascade, size: Size, progress: Progress
) -> tuple[dict[str, Any], np.ndarray]:
    """All figures by name, and a contact sheet.

    The pair that a prompt asks for is excluded from retrieval (with any other pair of the same picture).
    """
    started = time.monotonic()
    prompts = suite.prompts
    neighbors = [knowledge_base.retrieve(Query(prompt=p.text, k=K, exclude_exact=True)).neighbors for p in prompts]
    texts, total = [p.text for p in prompts], len(prompts)
    drawn = cascade.draw_64(texts, neighbors, seed=SEED, progress=lambda n: progress("with neighbors", n, total))
    plain = cascade.draw_64(
        texts,
        [[]] * total,
        seed=SEED,
        spec=guided_by_text(stage(64)),
        progress=lambda n: progress("without neighbors", n, total),
    )
    copied = [
        neighbor_picture(found[0], 64) if found else p.true_picture(64)
        for p, found in zip(prompts, neighbors, strict=True)
    ]
    recall = np.mean(
        [sum(n.pair.entity == p.target.entity for n in f) == K for p, f in zip(prompts, neighbors, strict=True)]
    )
    figures: dict[str, Any] = {
        "prompts": total,
        "gallery": suite.smallest_gallery,
        "steps_64": stage(64).steps,
        "retrieval_two_right": round(float(recall), 4),
        **_entity(suite, drawn, ""),
        **_entity(suite, plain, "_without_neighbors"),
        **_entity(suite, copied, COPYING),
        **_backgrounds(prompts, drawn),
        **_corners(prompts, drawn),
        **_enlargement(suite, cascade, 256, size.enlarged_256, progress),
        **_enlargement(suite, cascade, 1024, size.enlarged_1024, progress),
        **_whole_cascade(prompts[: size.whole], drawn, cascade, progress),
        **{f"examples_{s}": w.trained.get("examples") for s, w in cascade.stages.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, _sheet(prompts, neighbors, drawn, plain)


def _entity(suite: Suite, pictures: Sequence[np.ndarray], suffix: str) -> dict[str, float]:
    """R@1, R@5 and mean reciprocal rank among the true renderings, in the prompt's style and scene, of all held-out
    entities of that style."""
    ranks = []
    for prompt, picture in zip(suite.prompts, pictures, strict=True):
        style = prompt.target.facets["style"]
        target = next(i for i, pair in enumerate(suite.gallery[style]) if pair.key == prompt.target.key)
        # A copied neighbor fills a white canvas, so it is judged among pictures that do too.
        scene = Scene() if suffix == COPYING else prompt.scene
        ranks.append(rank_of(entity_features(picture), suite.gallery_features(style, scene), target))
    found = np.array(ranks)
    return {
        f"entity_r1{suffix}": round(float(np.mean(found == 1)), 4),
        f"entity_r5{suffix}": round(float(np.mean(found <= 5)), 4),
        f"entity_mrr{suffix}": round(float(np.mean(1.0 / found)), 4),
    }


def _backgrounds(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of the prompts naming a color whose picture has it; and the same of the true pictures, whose entity may
    itself cover the border (a flag)."""
    named = [(p, picture) for p, picture in zip(prompts, pictures, strict=True) if p.scene.color]
    right = [background_color(picture) == p.scene.color for p, picture in named]
    true = [background_color(p.true_picture(64)) == p.scene.color for p, _ in named]
    return {
        "background_accuracy": round(float(np.mean(right)), 4),
        "background_accuracy_of_true_pictures": round(float(np.mean(true)), 4),
        "background_prompts": len(named),
    }


def _corners(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    """Share of the prompts naming a corner whose picture has its entity there; and the same of the true pictures, whose
    entity may hardly stand out from the background."""
    named = [(p, picture) for p, picture in zip(prompts, pictures, strict=True) if p.scene.corner]
    right = [quarter_of(picture) == p.scene.corner for p, picture in named]
    true = [quarter_of(p.true_picture(64)) == p.scene.corner for p, _ in named]
    return {
        "corner_accuracy": round(float(np.mean(right)), 4),
        "corner_accuracy_of_true_pictures": round(float(np.mean(true)), 4),
        "corner_prompts": len(named),
    }


def _enlargement(suite: Suite, cascade: Cascade, size: int, count: int, progress: Progress) -> dict[str, float]:
    """Mean PSNR of the stage over the shrunk true picture, less that of bicubic enlargement."""
    gains, ours = [], []
    for i, prompt in enumerate(suite.prompts[:count]):
        true = prompt.true_picture(size)
        low = shrink(true, 4)
        quality = psnr(cascade.enlarge(low, size, seed=SEED, sample=i), true)
        gains.append(quality - psnr(enlarge_bicubic(low, size), true))
        ours.append(quality)
        progress(f"enlarging to {size}", i + 1, count)
    return {
        f"sr{size}_db_over_bicubic": round(float(np.mean(gains)), 3),
        f"sr{size}_psnr": round(float(np.mean(ours)), 3),
    }


def _whole_cascade(
    prompts: Sequence[Prompt], drawn: Sequence[np.ndarray], cascade: Cascade, progress: Progress
) -> dict[str, float]:
    """Of pictures of 1024 drawn from the prompts: mean color drift from those of 64, in levels of 255, and the median width of
    their edges in pixels; and the same width of the true pictures."""
    differences, widths, true_widths = [], [], []
    for i, (prompt, picture) in enumerate(zip(prompts, drawn, strict=False)):
        large = cascade.enlarge(cascade.enlarge(picture, 256, seed=SEED, sample=i), 1024, seed=SEED, sample=i)
        differences.append(color_drift(picture, large))
        widths.append(edge_widths(large))
        true_widths.append(edge_widths(prompt.true_picture(1024)))
        progress("64 to 1024", i + 1, len(prompts))
    return {
        "color_drift": round(float(np.mean(differences)), 3),
        "edge_width_px": round(float(np.median(np.concatenate(widths))), 2),
        "edge_width_px_of_true_pictures": round(float(np.median(np.concatenate(true_widths))), 2),
    }


def _sheet(
    prompts: Sequence[Prompt],
    neighbors: Sequence[Sequence[Neighbor]],
    drawn: Sequence[np.ndarray],
    plain: Sequence[np.ndarray],
) -> np.ndarray:
    """Rows of: two neighbors, drawn with them, drawn without, the true picture; two prompts a row."""
    rows, labels = [], []
    for i in range(0, min(2 * SHEET_ROWS, len(prompts) - 1), 2):
        row: list[np.ndarray] = []
        for j in (i, i + 1):
            blank = [np.full((64, 64, 3), 255, np.uint8)] * (K - len(neighbors[j]))
            found = [neighbor_picture(n, 64) for n in neighbors[j]]
            row += [*found, *blank, drawn[j], plain[j], prompts[j].true_picture(64)]
        rows.append(row)
        labels.append("neighbors, with, without, true: " + "   |   ".join(prompts[j].text for j in (i, i + 1)))
    return contact_sheet(rows, labels)


def write_results(folder: Path, figures: dict[str, Any], sheet: np.ndarray) -> None:
    """Write `demo.json` and `demo.png`."""
    write_json(folder / "demo.json", figures)
    write_atomic(folder / "demo.png", encode_png(sheet))
