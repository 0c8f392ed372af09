"""What people rate: the pictures that one system drew for one prompt, beside real pictures of the entity."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.entitydraw.results import PictureRow, RunFolder

Judge = Literal["best", "each"]
CheckKind = Literal["real", "wrong", "broken"]
Change = Literal["none", "mirrored", "closer", "closer-mirrored", "scrambled"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture as raters see it.

    Attributes:
        path: the file it is made from.
        change: what is done to it, of attention checks alone.
        seed: that the picture was drawn with; of a scrambled one, of the scrambling.
        sha256: of the file as the run has it; empty where it is no picture of a run.
    """

    path: Path
    change: Change = "none"
    seed: int = 0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to rate: the best of `pictures` is judged.

    Attributes:
        item_id: the same as long as system, prompt and pictures are; tells nothing.
        system: as reports name it; empty of an attention check.
        references: real pictures of the entity; the same for all systems.
        check: of an attention check, its kind.
    """

    item_id: str
    system: str
    prompt_id: str
    prompt: str
    category: str
    entity: str
    frequent: bool
    pictures: tuple[Shown, ...]
    references: tuple[Path, ...]
    check: CheckKind | None = None


def load_items(runs: Sequence[Path], judge: Judge = "best") -> list[Item]:
    """The items of runs of EntityDrawBench, sorted.

    Args:
        runs: folders that `evaluation.entitydraw.results` describes. A prompt id means the same prompt in all of them.
        judge: `best`: all pictures that a system drew for a prompt are one item (Re-Imagen, section 5.3: four are drawn,
            the best is rated); `each`: every picture is one.

    Raises:
        RunError: a folder is no run.
        ValueError: a run holds no picture, a file lies outside of its run, a prompt has no reference picture, or two
            runs cannot be told apart.
    """
    found = [(RunFolder(path), _rows(path)) for path in runs]
    references = _references(found)
    labels = _labels(found)
    items = []
    for folder, rows in found:
        groups: dict[tuple[object, ...], list[PictureRow]] = defaultdict(list)
        for row in rows:
            groups[row.key if judge == "each" else row.key[:2]].append(row)
        for group in groups.values():
            label = labels[folder.path, group[0].system]
            items.append(_item(folder, label, group, references[group[0].prompt_id]))
    return sorted(items, key=lambda item: (item.system, item.prompt_id, item.item_id))


def _rows(path: Path) -> list[PictureRow]:
    folder = RunFolder(path)
    folder.read_run()
    rows = folder.rows()
    if not rows:
        raise ValueError(f"run: {path} holds no picture")
    return rows


def _item(folder: RunFolder, label: str, rows: Sequence[PictureRow], references: tuple[Path, ...]) -> Item:
    rows = sorted(rows, key=lambda row: row.seed)
    first = rows[0]
    content = "\0".join([label, first.prompt_id, *(row.sha256 for row in rows)])
    return Item(
        item_id=hashlib.sha256(content.encode()).hexdigest()[:16],
        system=label,
        prompt_id=first.prompt_id,
        prompt=first.prompt,
        category=first.category,
        entity=first.entity,
        frequent=first.frequent,
        pictures=tuple(Shown(path=_inside(folder, r.file), seed=r.seed, sha256=r.sha256) for r in rows),
        references=references,
    )


def _references(found: Iterable[tuple[RunFolder, Sequence[PictureRow]]]) -> dict[str, tuple[Path, ...]]:
    """By prompt, what any system's rows name: what a rater compares with must not tell systems apart."""
    by_prompt: dict[str, dict[str, Path]] = defaultdict(dict)
    for folder, rows in found:
        for row in rows:
            known = by_prompt[row.prompt_id]
            for name in row.suite_references:
                path = _inside(folder, name)
                if not path.is_file():
                    raise ValueError(f"run: {folder.rows_file} names {name}, which is not there")
                known.setdefault(path.name, path)
    bare = sorted(prompt_id for prompt_id, paths in by_prompt.items() if not paths)
    if bare:
        raise ValueError(f"run: prompt {bare[0]} has no picture of its entity to compare with")
    return {prompt_id: tuple(paths.values()) for prompt_id, paths in by_prompt.items()}


def _inside(folder: RunFolder, name: str) -> Path:
    """Whoever wrote the rows must not have this machine's other files shown."""
    path = (folder.path / name).resolve()
    if not path.is_relative_to(folder.path.resolve()):
        raise ValueError(f"run: {folder.rows_file} names {name!r}, which is not inside the run")
    return path


def _labels(found: Iterable[tuple[RunFolder, Sequence[PictureRow]]]) -> dict[tuple[Path, str], str]:
    """System by run and name; with the run's name before it where several runs have a system of that name."""
    owners: dict[str, list[Path]] = defaultdict(list)
    for folder, rows in found:
        for system in sorted({row.system for row in rows}):
            owners[system].append(folder.path)
    labels = {
        (path, system): system if len(paths) == 1 else f"{path.resolve().name}/{system}"
        for system, paths in owners.items()
        for path in paths
    }
    if len(set(labels.values())) < sum(len(paths) for paths in owners.values()):
        raise ValueError("run: two runs have folders of the same name and a system of the same name")
    return labels
