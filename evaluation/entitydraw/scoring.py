"""Scores of a run's pictures, one by one. What they say together is `figures`.

Entity. Where the suite names the pair that is asked for: the picture's rank among the true renderings, in the prompt's style
and scene, of all held-out entities of that style. Where it names reference pictures alone: the rank of the entity among the
entities of its category, each by its nearest reference. Features are hand-made (`evaluation.features`), so no network can
have been trained on them; they compare place by place.
Copies. Whether the picture is a neighbor, pasted (`evaluation.scores.copies`).
Text. Of prompts that end with a scene of `common.scenes`: whether the background has the color, and whether the entity lies
in the corner, that the prompt names; and of those that ask for a style, whether a classifier that knows training entities
alone takes the picture for one of it (`evaluation.scores.style`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from common.corpus import Pair
from common.images import decode_rgb, over_color, rasterize, shrink
from common.scenes import WHITE, Scene, all_scenes, compose
from evaluation.entitydraw.progress import Progress
from evaluation.entitydraw.results import PictureRow, RunError, RunFolder, ScoreRow
from evaluation.entitydraw.suite_file import Suite, SuiteEntity, SuitePrompt
from evaluation.features import SIDE, background_color, entity_features, quarter_of
from evaluation.scores.copies import copy_likenesses, near_copies

Scores = dict[str, float | None]
Styles = Callable[[Sequence[np.ndarray]], Sequence[str]]
"""The style of each picture, uint8 [64, 64, 3]."""
SCORES = {
    "entity_r1",
    "entity_r5",
    "entity_rr",
    "entity_likeness",
    "neighbors_right",
    "background",
    "corner",
}
"""What is measured of every picture; rows that lack one are measured again."""
KEPT_GALLERIES = 128  # about 1 MB each
KEEP_S = 20.0  # between writes of scores while there are more to come


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What a picture is compared with: features [N, D], and whose each row is."""

    features: np.ndarray
    entities: tuple[str, ...]

    def likeness(self, features: np.ndarray) -> dict[str, float]:
        """Of each entity, that of its nearest row: at most 1."""
        found: dict[str, float] = {}
        if not self.entities:  # of a suite without pictures, whose width is nobody's
            return found
        for entity, value in zip(self.entities, self.features @ features / 2.0, strict=True):
            found[entity] = max(found.get(entity, -1.0), float(value))
        return found


def rank(likeness: Mapping[str, float], entity: str) -> int | None:
    """Rank of an entity, 1 the best; equals count against it. None where it is not in the gallery."""
    if entity not in likeness:
        return None
    return sum(value >= likeness[entity] for value in likeness.values())


def scene_of(prompt: str) -> Scene | None:
    """The scene that a prompt ends with; None where it ends with none."""
    return _scenes().get(_ending(prompt))


@cache
def _scenes() -> dict[str, Scene]:
    return {", ".join(scene.phrases): scene for scene in all_scenes()}


def _ending(prompt: str) -> str:
    parts = prompt.split(", ")
    small = len(parts) > 1 and parts[-2].startswith("small in the ")
    return ", ".join(parts[-2:] if small else parts[-1:])


def score_picture(pixels: np.ndarray, row: PictureRow, gallery: Gallery) -> Scores:
    """Scores of a picture, uint8 [64, 64, 3]; `gallery` is that of its prompt."""
    likeness = gallery.likeness(entity_features(pixels))
    place, others = rank(likeness, row.entity), rank(likeness, row.other) if row.other else None
    scene = scene_of(row.prompt)
    scores: Scores = {
        "entity_r1": _share(place, 1),
        "entity_r5": _share(place, 5),
        "entity_rr": 1.0 / place if place else None,
        "entity_likeness": likeness.get(row.entity),
        "neighbors_right": _neighbors_right(row),
        "background": float(background_color(pixels) == scene.color) if scene and scene.color else None,
        "corner": float(quarter_of(pixels) == scene.corner) if scene and scene.corner else None,
    }
    if row.other:
        scores |= {"other_r1": _share(others, 1), "other_rr": 1.0 / others if others else None}
    return scores


def _neighbors_right(row: PictureRow) -> float | None:
    """Of what was looked up alone: a reference says no entity."""
    found = [neighbor for neighbor in row.neighbors if not neighbor.is_reference]
    return sum(neighbor.entity == row.entity for neighbor in found) / len(found) if found else None


def _share(place: int | None, cutoff: int) -> float | None:
    return None if place is None else float(place <= cutoff)


class Galleries:
    """The galleries of a suite's prompts; the last ones are kept, so that rows of one gallery best come together."""

    def __init__(self, suite: Suite, held_out: Mapping[str, Sequence[Pair]]) -> None:
        """`held_out`: pairs by style, of `evaluation.suite.by_style`; none where the suite names no targets."""
        self._suite = suite
        self._held_out = held_out
        self._drawn: dict[tuple[str, int], np.ndarray] = {}
        self._made: dict[tuple[str, ...], Gallery] = {}

    def key(self, prompt: SuitePrompt) -> tuple[str, ...]:
        """Names a prompt's gallery."""
        style = prompt.target.facets.get("style", "") if prompt.target else ""
        if style in self._held_out:
            return "style", style, _ending(prompt.text)
        return "category", prompt.entity.category

    def of(self, prompt: SuitePrompt) -> Gallery:
        """The gallery of a prompt."""
        key = self.key(prompt)
        if key not in self._made:
            if len(self._made) >= KEPT_GALLERIES:
                self._made.pop(next(iter(self._made)))
            of_style = key[0] == "style"
            self._made[key] = self._of_style(key[1], scene_of(prompt.text)) if of_style else self._of_category(key[1])
        return self._made[key]

    def _of_style(self, style: str, scene: Scene | None) -> Gallery:
        pairs = self._held_out[style]
        pictures = [compose(self._drawing(pair), scene or Scene(), SIDE) for pair in pairs]
        features = np.stack([entity_features(picture) for picture in pictures]).astype(np.float32)
        return Gallery(features=features, entities=tuple(pair.entity for pair in pairs))

    def _drawing(self, pair: Pair) -> Callable[[int], np.ndarray]:
        def draw(side: int) -> np.ndarray:
            if (pair.key, side) not in self._drawn:
                self._drawn[pair.key, side] = rasterize(pair.image, pair.image_format, side)
            return self._drawn[pair.key, side]

        return draw

    def _of_category(self, category: str) -> Gallery:
        entities = [each for each in self._suite.entities if each.category == category and each.references]
        if not entities:
            return Gallery(features=np.zeros((0, 1)), entities=())
        shown = [(each.name, picture) for each in entities for picture in _pictures(each)]
        features = np.stack([entity_features(picture) for _, picture in shown])
        return Gallery(features=features, entities=tuple(name for name, _ in shown))


def _pictures(entity: SuiteEntity) -> list[np.ndarray]:
    return [over_color(rasterize(r.image, r.image_format, SIDE), WHITE) for r in entity.references]


def read_picture(folder: RunFolder, row: PictureRow) -> np.ndarray:
    """uint8 [64, 64, 3] of a picture of any size.

    Raises:
        RunError: the file is not what the row says.
    """
    try:
        pixels = decode_rgb((folder.path / row.file).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"run: {folder.path / row.file}: cannot be read ({error})") from None
    return small(pixels)


def small(pixels: np.ndarray) -> np.ndarray:
    """uint8 [64, 64, 3] of a square picture: averaged where it is a multiple, else resampled."""
    side = pixels.shape[0]
    if pixels.shape[:2] == (side, side) and side % SIDE == 0:
        return shrink(pixels, side // SIDE)
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def score_run(
    folder: RunFolder,
    suite: Suite,
    galleries: Galleries,
    progress: Progress,
    styles_of: Styles | None = None,
    *,
    copies: bool = True,
    systems: Collection[str] = (),
) -> list[ScoreRow]:
    """Score every picture of a run that is not scored yet, and write `scores.jsonl`.

    Args:
        styles_of: tells pictures' styles; None: they are not scored.
        copies: whether near copies are looked for, which takes the longest.
        systems: of which pictures are scored; none: of all.

    Raises:
        RunError: a row is of a prompt that the suite does not have, or a file cannot be read.
    """
    prompts = {prompt.id: prompt for prompt in suite.prompts}
    rows = folder.rows()
    for row in rows:
        if row.prompt_id not in prompts:
            raise RunError(f"run: {folder.rows_file}: prompt_id {row.prompt_id!r} is not of the suite {suite.name!r}")
    wanted = SCORES | ({"style"} if styles_of else set()) | ({"near_copy"} if copies else set())
    there = {score.key: score for score in folder.scores()}
    rows = [row for row in rows if not systems or row.system in systems]
    known = {row.key: there[row.key] for row in rows if row.key in there and there[row.key].sha256 == row.sha256}
    scored = [score for score in known.values() if set(score.scores) >= wanted]
    whole = {score.key for score in scored}
    todo = sorted((r for r in rows if r.key not in whole), key=lambda r: (galleries.key(prompts[r.prompt_id]), r.key))
    progress("scores", len(scored), len(rows))
    written = time.monotonic()
    for _, group in groupby(todo, key=lambda r: galleries.key(prompts[r.prompt_id])):
        scored += _score_group(folder, list(group), known, prompts, galleries, styles_of, copies)
        progress("scores", len(scored), len(rows))
        if time.monotonic() - written > KEEP_S:  # who is stopped here goes on here
            folder.write_scores({**there, **{score.key: score for score in scored}}.values())
            written = time.monotonic()
    folder.write_scores({**there, **{score.key: score for score in scored}}.values())
    return scored


def _score_group(
    folder: RunFolder,
    rows: Sequence[PictureRow],
    known: Mapping[tuple[str, str, int], ScoreRow],
    prompts: Mapping[str, SuitePrompt],
    galleries: Galleries,
    styles_of: Styles | None,
    copies: bool,
) -> list[ScoreRow]:
    """The scores of pictures that share a gallery; what is `known` already is not measured again."""
    pictures = [read_picture(folder, row) for row in rows]
    seen = styles_of(pictures) if styles_of else [""] * len(rows)
    found: list[ScoreRow] = []
    for row, pixels, style in zip(rows, pictures, seen, strict=True):
        prompt = prompts[row.prompt_id]
        scores = dict(known[row.key].scores) if row.key in known else {}
        if not set(scores) >= SCORES:
            scores |= score_picture(pixels, row, galleries.of(prompt))
        if copies and "near_copy" not in scores:
            scores["near_copy"] = _near_copy(folder, row, pixels)
        if styles_of:
            asked = prompt.target.facets.get("style") if prompt.target else None
            scores["style"] = float(style == asked) if asked else None
        found.append(
            ScoreRow(
                system=row.system, prompt_id=row.prompt_id, seed=row.seed, sha256=row.sha256, scores=_rounded(scores)
            )
        )
    return found


def _near_copy(folder: RunFolder, row: PictureRow, pixels: np.ndarray) -> float | None:
    files = [folder.path / neighbor.file for neighbor in row.neighbors if neighbor.file]
    if not files:
        return None
    return float(near_copies(copy_likenesses([pixels], [[_layer(path) for path in files]]))[0])


@lru_cache(maxsize=4096)
def _layer(path: Path) -> np.ndarray:
    """A neighbor, uint8 [64, 64, 4]; its file is named by its content."""
    return rasterize(path.read_bytes(), path.suffix[1:], SIDE)


def _rounded(scores: Scores) -> Scores:
    return {name: None if value is None else round(value, 5) for name, value in scores.items()}
