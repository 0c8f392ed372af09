"""`reimagen generate`: a request becomes files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from client.command_line import connected, print_json
from client.display import Display, make_display
from client.generation_types import Event, Generation, StepDone
from client.outputs import check_folder, write_output, write_outputs
from client.request_flags import add_request_flags, request_of

PREVIEWS = "previews"
RECORD = "record.json"


def add_generate(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The command and its flags."""
    parser = commands.add_parser("generate", parents=[shared], help="draw pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the files (default: out)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, not the files' names alone")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="deadline (default: 600)")
    add_request_flags(parser)
    parser.set_defaults(body=_generate)


def _generate(flags: argparse.Namespace) -> int:
    request = request_of(flags)
    check_folder(flags.out)
    display = make_display()
    with connected(flags, generator=True) as client, display.live():
        watch = _Watch(display, flags.out / PREVIEWS)
        drawn = client.generate(request, on_event=watch, timeout_s=flags.timeout_s)
    written = write_outputs(flags.out, _files(drawn))
    if flags.json:
        print_json(_document(drawn, flags.out))
    else:
        for path in written:
            print(path)
    return 0


class _Watch:
    """Shows what happens, and keeps the previews as they come."""

    def __init__(self, display: Display, folder: Path) -> None:
        self._display = display
        self._folder = folder

    def __call__(self, event: Event) -> None:
        self._display.show(event)
        if isinstance(event, StepDone) and event.preview_png:
            name = f"picture-{event.picture}-stage-{event.stage}-step-{event.step:04}.png"
            write_output(self._folder / name, event.preview_png)


def _names(drawn: Generation) -> list[str]:
    """The pictures' names, by their seeds; those that share a seed have a number too."""
    seeds = [image.seed for image in drawn.images]
    return [
        f"{image.seed}" if seeds.count(image.seed) == 1 else f"{image.seed}-{image.picture}" for image in drawn.images
    ]


def _files(drawn: Generation) -> dict[str, bytes]:
    names = _names(drawn)
    files = {f"image-{name}.{image.image_format}": image.image for name, image in zip(names, drawn.images, strict=True)}
    kinds = {image.picture: (name, image.image_format) for name, image in zip(names, drawn.images, strict=True)}
    for finished in drawn.stages:
        name, image_format = kinds[finished.picture]
        files[f"stage-{finished.stage}-{name}.{image_format}"] = finished.image
    files[RECORD] = (json.dumps(drawn.record, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _document(drawn: Generation, folder: Path) -> dict[str, Any]:
    files = list(_files(drawn))
    images = [
        {"path": str(folder / path), "seed": image.seed, "record": image.record}
        for path, image in zip(files, drawn.images, strict=False)
    ]
    stages = [
        {"path": str(folder / path), "stage": finished.stage, "picture": finished.picture}
        for path, finished in zip(files[len(images) :], drawn.stages, strict=False)
    ]
    return {"images": images, "stages": stages, "neighbors": drawn.neighbors, "record": drawn.record}
