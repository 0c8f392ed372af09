"""A run of EntityDrawBench in the small: simple drawings, each telling in its metadata and its file's name who drew it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.files import write_atomic
from common.images import encode_png
from evaluation.entitydraw.results import PictureRow, RunFolder
from evaluation.rating.items import Item, load_items

SYSTEMS = ("plain-secret", "retrieving-secret")
ENTITIES = {
    "guide-dog": ("animals", "guide dog"),
    "red-apple": ("foods", 'red <b>apple</b> & "co"<img src=x onerror="document.title=\'broken in\'">'),
    "old-oak": ("plants", "old oak"),
    "clock-tower": ("landmarks", "clock tower"),
    "noodle-soup": ("foods", "noodle soup"),
    "gray-heron": ("animals", "gray heron"),
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="4" fill="{color}"/></svg>'


def drawing(hue: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: a disk; no two hues give the same picture."""
    y, x = np.mgrid[:side, :side] / side
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05 + 0.1 * (hue % 7) / 7
    color = np.array([hue * 37 % 256, hue * 91 % 256, hue * 53 % 256], np.uint8)
    return np.where(inside[..., None], color, np.uint8(235)).astype(np.uint8)


def make_run(
    path: Path, *, systems: Sequence[str] = SYSTEMS, entities: Sequence[str] = tuple(ENTITIES), seeds: int = 4
) -> RunFolder:
    """A finished run: per system and entity one prompt of `seeds` pictures, and two reference pictures an entity."""
    folder = RunFolder(path)
    folder.write_run({"systems": list(systems)})
    rows, hue = [], 0
    for number, prompt_id in enumerate(entities):
        category, entity = ENTITIES[prompt_id]
        references = (
            folder.keep_reference(SVG.format(color=f"#{number * 40 + 15:02x}55aa").encode(), "svg"),
            folder.keep_reference(encode_png(drawing(100 + number, 80)), "png"),
        )
        for s, system in enumerate(systems):
            for seed in range(seeds):
                hue += 1
                file = folder.picture_file(system, prompt_id, seed)
                record = json.dumps({"system": system, "weights": "secret"})
                write_atomic(file, encode_png(drawing(hue, 32 + 16 * s), {"reimagen": record}))
                rows.append(
                    PictureRow(
                        system=system,
                        prompt_id=prompt_id,
                        prompt=f"{entity}, on a blue background",
                        category=category,
                        entity=entity,
                        frequency=float(number),
                        frequent=number % 2 == 0,
                        seed=seed,
                        file=folder.relative(file),
                        sha256=f"{hue:064x}",
                        suite_references=references,
                    )
                )
    folder.write_rows(rows)
    return folder


def change_rows(folder: RunFolder, **changes: object) -> None:
    """The first row with other values."""
    first, *others = folder.rows()
    folder.write_rows([replace(first, **changes), *others])  # type: ignore[arg-type]


def sample_items(path: Path, **how: object) -> list[Item]:
    """The items of such a run."""
    return load_items([make_run(path, **how).path])  # type: ignore[arg-type]
