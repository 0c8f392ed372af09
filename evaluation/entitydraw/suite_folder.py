"""Entities out of a folder of the user's own pictures: CATEGORY/ENTITY/*.jpg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".svg": "svg"}
FREQUENCY = "frequency.json"


class FolderError(ValueError):
    """The folder is not laid out so; the message names what is wrong."""


def folder_entities(folder: Path) -> list[dict[str, Any]]:
    """The entities as a suite's file would have them; pictures are named from `folder`.

    Raises:
        FolderError: there is none, or frequency.json is no object of numbers.
    """
    frequency = _frequency(folder / FREQUENCY)
    entities: list[dict[str, Any]] = []
    for home in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        pictures = sorted(path for path in home.iterdir() if path.suffix.lower() in KINDS)
        if pictures:
            entity = {"name": home.name, "category": home.parent.name}
            references = [{"image": str(p.relative_to(folder)), "caption": _caption(p, home.name)} for p in pictures]
            entities.append({**entity, "frequency": frequency.get(home.name, 0), "references": references})
    if not entities:
        raise FolderError(f"{folder}: holds no CATEGORY/ENTITY/*.jpg")
    return entities


def _caption(picture: Path, name: str) -> str:
    said = picture.with_suffix(".txt")
    return (said.read_text(encoding="utf-8").strip() if said.is_file() else "") or name


def _frequency(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path}: is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise FolderError(f"{path}: is no object of numbers by entity")
    return said
