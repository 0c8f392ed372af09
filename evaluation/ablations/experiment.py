"""Draws an ablation, or goes on with it, and writes what came of it: NAME.json, NAME.png, NAME-sheet.png."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client import Client
from common.files import write_atomic, write_json
from common.images import contact_sheet, encode_png, over_color, rasterize
from common.scenes import WHITE, Scene
from evaluation.ablations.plots import draw_plot
from evaluation.ablations.recommendation import recommend
from evaluation.ablations.rows import Ablation
from evaluation.entitydraw.figures import run_figures
from evaluation.entitydraw.progress import Progress
from evaluation.entitydraw.requests import seeds_of
from evaluation.entitydraw.results import PictureRow, RunError, RunFolder, ScoreRow
from evaluation.entitydraw.runner import RunSettings, run_suite
from evaluation.entitydraw.scoring import Galleries, Styles, read_picture, scene_of, score_run
from evaluation.entitydraw.suite_file import Suite, SuitePrompt
from evaluation.features import SIDE
from evaluation.suite import draw

SHEET_PROMPTS = 8
SHEET_NEIGHBORS = 2
SHEET_CELL = 96


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where pictures are kept (one run of all ablations), and where the data, the plots and the sheets go."""

    run: Path
    out: Path


def draw_ablation(row: Ablation, suite: Suite, client: Client, places: Places, calls: int, progress: Progress) -> None:
    """Draw what lacks.

    Raises:
        RunError: the run that is there is of another suite or of other weights.
        GenerationFailed: the generator refused or failed.
    """
    settings = RunSettings(prompts=row.prompts, pictures=row.pictures, calls=calls, command=_command("all"))
    run_suite(suite, row.systems, client, RunFolder(places.run), settings, progress)


def _command(name: str) -> str:
    return f"python -m evaluation ablation {name} --generator HOST:PORT"


def measure_ablation(
    row: Ablation,
    suite: Suite,
    galleries: Galleries,
    places: Places,
    progress: Progress,
    styles_of: Styles | None = None,
) -> dict[str, Any]:
    """Score what is drawn, and write; gives the data.

    Raises:
        RunError: there is no such run, or no prompt that all systems have drawn.
    """
    folder = RunFolder(places.run)
    names = frozenset(system.name for system in row.systems)
    copies = "near_copy" in row.figures
    scored = score_run(folder, suite, galleries, progress, styles_of, copies=copies, systems=names)
    shared = _shared(row, suite, scored)
    scores = [score for score in scored if score.key[1:] in shared]
    rows = [each for each in folder.rows() if each.system in names and each.key[1:] in shared]
    if not scores:
        raise RunError(f"run: {folder.path}: holds no prompt that every system of {row.name!r} has drawn")
    figures = run_figures(rows, scores, row.compared, order=[system.name for system in row.systems])
    advice = {"recommended": recommend(row, scores, figures["systems"])} if row.recommends else {}
    written = {
        "name": row.name,
        "question": row.question,
        "axis": row.axis,
        "points": [{"system": point.system.to_json(), "x": point.x, "series": point.series} for point in row.points],
        "run": _run(row, folder),
        "pictures_sha256": _digest(rows),
        **advice,
        **figures,
    }
    write_json(places.out / f"{row.name}.json", written)
    write_atomic(places.out / f"{row.name}.png", draw_plot(row, figures["systems"], advice))
    write_atomic(places.out / f"{row.name}-sheet.png", encode_png(draw_sheet(row, suite, folder, rows)))
    return written


def _shared(row: Ablation, suite: Suite, scores: Sequence[ScoreRow]) -> set[tuple[str, int]]:
    """The prompts and seeds of the row that every system has drawn: all, once the run is finished."""
    wanted = {(p.id, seed) for p in suite.part(row.prompts) for seed in seeds_of(suite, p, row.pictures)}
    drawn = Counter(score.key[1:] for score in scores)
    return {key for key in wanted if drawn[key] == len(row.systems)}


def _run(row: Ablation, folder: RunFolder) -> dict[str, Any]:
    """What the run says of this ablation."""
    run = folder.read_run()
    systems = {system.name: run["systems"][system.name] for system in row.systems}
    wanted = {"prompts": row.prompts, "pictures": row.pictures, "command": _command(row.name)}
    return {**run, **wanted, "systems": systems}


def _digest(rows: Sequence[PictureRow]) -> dict[str, str]:
    """sha256 over the sha256s of each system's pictures, in the order of their keys: names all of them."""
    return {
        system: RunFolder.digest(row.sha256 for row in sorted(rows, key=lambda r: r.key) if row.system == system)
        for system in sorted({row.system for row in rows})
    }


def draw_sheet(row: Ablation, suite: Suite, folder: RunFolder, rows: Sequence[PictureRow]) -> np.ndarray:
    """The first prompts, a line each: neighbors of the system that has most, the first picture of every system, and
    what was asked for."""
    by_key: dict[tuple[str, str], PictureRow] = {}
    for each in sorted(rows, key=lambda r: r.key):
        by_key.setdefault((each.system, each.prompt_id), each)
    lines: list[list[np.ndarray]] = []
    labels: list[str] = []
    for prompt in suite.part(row.prompts)[:SHEET_PROMPTS]:
        found = [by_key.get((system.name, prompt.id)) for system in row.systems]
        shaped = max((each for each in found if each), key=lambda each: len(each.neighbors), default=None)
        pictures = [_blank() if each is None else read_picture(folder, each) for each in found]
        lines.append([*neighbor_pictures(folder, shaped), *pictures, true_picture(prompt)])
        labels.append(prompt.text)
    header = ["neighbors", "", *(system.name for system in row.systems), "asked for"]
    labels = [f"{' | '.join(name for name in header if name)}:   {labels[0]}", *labels[1:]] if labels else labels
    return contact_sheet(lines, labels, cell=SHEET_CELL)


def neighbor_pictures(folder: RunFolder, row: PictureRow | None) -> list[np.ndarray]:
    """The first neighbors of a picture on white, uint8 [64, 64, 3]; blanks where there are fewer."""
    shown: list[np.ndarray] = []
    for neighbor in row.neighbors[:SHEET_NEIGHBORS] if row else ():
        path = folder.path / neighbor.file
        shown.append(over_color(rasterize(path.read_bytes(), path.suffix[1:], SIDE), WHITE))
    return shown + [_blank()] * (SHEET_NEIGHBORS - len(shown))


def true_picture(prompt: SuitePrompt) -> np.ndarray:
    """What a prompt asks for, uint8 [64, 64, 3]; blank where the suite does not say."""
    return draw(prompt.target, scene_of(prompt.text) or Scene(), SIDE) if prompt.target else _blank()


def _blank() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 235, np.uint8)
