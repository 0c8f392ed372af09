"""Flags that say what is to be drawn, and the request that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from client.command_line import BadInput, read_file, split_pair
from client.generation_messages import (
    IMAGE_FORMATS,
    METHODS,
    PRIORITIES,
    SAMPLERS,
    STRATEGIES,
    THRESHOLDINGS,
)
from client.generation_types import GenerationRequest, Reference, StageOverrides, StartFrom
from client.picture_record import read_record

SIZES = (64, 256, 1024)
_OVERRIDES: dict[str, dict[str, Any]] = {
    "steps": {"type": int, "metavar": "N", "help": "denoising steps"},
    "sampler": {"choices": SAMPLERS, "help": "sampler"},
    "guidance_strategy": {"choices": STRATEGIES, "help": "how text and neighbors are weighed"},
    "text_weight": {"type": float, "metavar": "W", "help": "guidance weight of text"},
    "neighbor_weight": {"type": float, "metavar": "W", "help": "guidance weight of neighbors"},
    "eta": {"type": float, "metavar": "SHARE", "help": "share of text steps"},
    "thresholding": {"choices": THRESHOLDINGS, "help": "how estimates are kept in range"},
    "augmentation": {"type": float, "metavar": "TIME", "help": "time to which the input is noised"},
}


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Every knob of a request, and its deadline; no knob has a default, so that the service's holds."""
    _add_content_flags(parser.add_argument_group("what is drawn"))
    _add_neighbor_flags(parser.add_argument_group("neighbors"))
    _add_course_flags(parser.add_argument_group("how it goes"))
    for size in SIZES:
        group = parser.add_argument_group(f"stage {size}")
        for name, options in _OVERRIDES.items():
            if (name, size) != ("augmentation", SIZES[0]):
                group.add_argument(f"--{name.replace('_', '-')}-{size}", dest=f"{name}_{size}", **options)


def request_of(flags: argparse.Namespace) -> GenerationRequest:
    """The request that the flags make.

    Raises:
        BadInput: a file cannot be read, or a flag lacks another.
    """
    return GenerationRequest(
        prompt=flags.prompt,
        k=flags.k,
        knowledge_base=flags.knowledge_base,
        method=flags.method,
        excluded_pair_ids=tuple(flags.exclude_pair),
        exclude_exact=flags.exclude_exact,
        without_neighbors=flags.without_neighbors,
        num_pictures=flags.num_pictures,
        seed=flags.seed,
        stop_at=flags.stop_at,
        stages=_overrides(flags),
        preview_every=flags.preview_every,
        negative_prompt=flags.negative_prompt,
        references=_references(flags),
        seeds=flags.seeds,
        start_from=_start_from(flags),
        image_format=flags.format,
        every_stage=flags.every_stage,
        priority=flags.priority,
        request_id=flags.request_id,
        record_json=_record(flags),
    )


def _add_content_flags(group: Any) -> None:
    group.add_argument("--prompt", default="", help='e.g. "a guide dog, noto style, on a blue background"')
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what is not to be drawn")
    group.add_argument("--num-pictures", type=_above_zero, metavar="N", help="how many (default: 1, or one a seed)")
    group.add_argument("--seed", type=int, help="0 to 2^63 - 1 (default: drawn by the service)")
    group.add_argument("--seeds", type=_seeds, default=(), metavar="N,N,...", help="one for each picture")
    group.add_argument("--stop-at", type=int, choices=SIZES, help="the last stage (default: 1024)")
    group.add_argument("--start-from", type=Path, metavar="IMAGE", help="begin with this picture instead of noise")
    group.add_argument("--start-stage", type=int, choices=SIZES, help="the first stage that is run (default: 64)")
    group.add_argument("--strength", type=float, metavar="TIME", help="how far the picture is noised, in (0, 1]")
    group.add_argument(
        "--record", type=Path, metavar="FILE", help="draw this picture, or the one of this record, again"
    )
    group.add_argument("--format", choices=IMAGE_FORMATS, default="", help="of the pictures (default: png)")


def _add_neighbor_flags(group: Any) -> None:
    group.add_argument("--k", type=_above_zero, metavar="N", help="how many are retrieved (default: 2)")
    group.add_argument("--knowledge-base", default="", metavar="NAME", help="where they are looked up")
    group.add_argument("--method", choices=METHODS, default="", help="how they are found")
    group.add_argument(
        "--exclude-pair", action="append", default=[], metavar="ID", help="leave out this pair; may be repeated"
    )
    group.add_argument("--exclude-exact", action="store_true", help="leave out the very pair that the prompt asks for")
    group.add_argument("--without-neighbors", action="store_true", help="draw from the text alone")
    group.add_argument(
        "--reference", action="append", default=[], metavar="IMAGE=CAPTION", help="a pair of yours; may be repeated"
    )
    for credit in ("author", "source", "license"):
        group.add_argument(f"--reference-{credit}", default="", metavar="TEXT", help=f"{credit} of all references")


def _add_course_flags(group: Any) -> None:
    group.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="deadline (default: 600)")
    group.add_argument("--preview-every", type=_above_zero, default=0, metavar="N", help="a preview every N steps")
    group.add_argument("--every-stage", action="store_true", help="the pictures of the earlier stages too")
    group.add_argument("--priority", choices=PRIORITIES, default="", help="who goes first (default: normal)")
    group.add_argument("--request-id", default="", metavar="UUID", help="names this request, so that it is drawn once")


def _overrides(flags: argparse.Namespace) -> tuple[StageOverrides, ...]:
    given = {
        size: {name: value for name in _OVERRIDES if (value := getattr(flags, f"{name}_{size}", None)) is not None}
        for size in SIZES
    }
    return tuple(StageOverrides(stage=size, **values) for size, values in given.items() if values)


def _references(flags: argparse.Namespace) -> tuple[Reference, ...]:
    credits = {name: getattr(flags, f"reference_{name}") for name in ("author", "source", "license")}
    if any(credits.values()) and not flags.reference:
        raise BadInput("--reference: is missing; its author, source or license is given")
    pairs = [split_pair("--reference", text) for text in flags.reference]
    return tuple(
        Reference(image=read_file("--reference", Path(path)), caption=caption, **credits) for path, caption in pairs
    )


def _start_from(flags: argparse.Namespace) -> StartFrom | None:
    if flags.start_from is None:
        for name in ("start_stage", "strength"):
            if getattr(flags, name) is not None:
                raise BadInput(f"--{name.replace('_', '-')}: does nothing without --start-from")
        return None
    image = read_file("--start-from", flags.start_from)
    return StartFrom(image=image, stage=flags.start_stage, strength=flags.strength)


def _record(flags: argparse.Namespace) -> str:
    if flags.record is None:
        if not flags.prompt:
            raise BadInput("--prompt: is missing; give it, or --record")
        return ""
    content = read_file("--record", flags.record)
    try:
        return read_record(content)
    except ValueError as error:
        raise BadInput(f"--record: {flags.record}: {error}") from None


def _above_zero(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers parted by commas") from None
