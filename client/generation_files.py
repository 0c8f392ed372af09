"""A drawing as the files that a command leaves."""

from __future__ import annotations

import json
from pathlib import Path

from client.display import Display
from client.generation_types import Event, Generation, StepDone
from client.outputs import write_output

RECORD = "record.json"
PREVIEWS = "previews"
COMPANIONS = ("stage-64.png", "stage-256.png", "stage-64.webp", "stage-256.webp", RECORD)
"""What belongs to the newest drawing of a folder; the pictures themselves stay."""


class Watch:
    """Is told the events of a drawing: shows them, and keeps the previews as they come."""

    def __init__(self, display: Display, folder: Path) -> None:
        self._display = display
        self._folder = folder

    def __call__(self, event: Event) -> None:
        self._display.show(event)
        if isinstance(event, StepDone) and event.preview_png:
            name = f"picture-{event.picture}-stage-{event.stage}-step-{event.step:04}.png"
            write_output(self._folder / PREVIEWS / name, event.preview_png)


def image_files(drawn: Generation) -> dict[str, bytes]:
    """The pictures by their files' names: image-SEED.png; those that share a seed have a number too."""
    return {
        f"image-{name}.{image.image_format}": image.image
        for name, image in zip(_names(drawn), drawn.images, strict=True)
    }


def stage_files(drawn: Generation) -> dict[str, bytes]:
    """The earlier stages' pictures: stage-64.png; where there are several pictures, stage-64-SEED.png."""
    names = _names(drawn)
    of_picture = {image.picture: (name, image.image_format) for name, image in zip(names, drawn.images, strict=True)}
    files: dict[str, bytes] = {}
    for finished in drawn.stages:
        name, image_format = of_picture[finished.picture]
        whose = f"-{name}" if len(names) > 1 else ""
        files[f"stage-{finished.stage}{whose}.{image_format}"] = finished.image
    return files


def record_file(record: object) -> dict[str, bytes]:
    """The record; a request with it draws all the pictures again."""
    return {RECORD: (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()}


def _names(drawn: Generation) -> list[str]:
    seeds = [image.seed for image in drawn.images]
    return [
        f"{image.seed}" if seeds.count(image.seed) == 1 else f"{image.seed}-{image.picture}" for image in drawn.images
    ]
