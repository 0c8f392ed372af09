"""`reimagen generate`: a request becomes files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from client.command_line import connected, print_json
from client.display import make_display
from client.generation_files import COMPANIONS, Watch, image_files, record_file, stage_files
from client.generation_types import Generation
from client.outputs import check_folder, write_outputs
from client.request_flags import add_request_flags, request_of


def add_generate(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The command and its flags."""
    parser = commands.add_parser("generate", parents=[shared], help="draw pictures")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the files (default: out)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, not the files' names alone")
    add_request_flags(parser)
    parser.set_defaults(body=_generate)


def _generate(flags: argparse.Namespace) -> int:
    request = request_of(flags)
    check_folder(flags.out)
    display = make_display()
    with connected(flags, generator=True) as client, display.live():
        drawn = client.generate(request, on_event=Watch(display, flags.out), timeout_s=flags.timeout_s)
    files = image_files(drawn) | stage_files(drawn) | record_file(drawn.record)
    written = write_outputs(flags.out, files, companions=COMPANIONS)
    if flags.json:
        print_json(_document(drawn, flags.out))
    else:
        for path in written:
            print(path)
    return 0


def _document(drawn: Generation, folder: Path) -> dict[str, Any]:
    images = [
        {"path": str(folder / name), "seed": image.seed, "record": image.record}
        for name, image in zip(image_files(drawn), drawn.images, strict=True)
    ]
    stages = [
        {"path": str(folder / name), "stage": finished.stage, "picture": finished.picture}
        for name, finished in zip(stage_files(drawn), drawn.stages, strict=True)
    ]
    return {"images": images, "stages": stages, "neighbors": drawn.neighbors, "record": drawn.record}
