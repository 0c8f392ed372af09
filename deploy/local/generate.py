"""A prompt becomes files: the body of `python -m deploy.local generate`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.client import Client
from client.command_line import BadInput
from client.display import Display
from client.generation_files import COMPANIONS, Watch, image_files, record_file, stage_files
from client.generation_messages import GenerationFailed
from client.generation_types import Generation, GenerationRequest, Neighbor, StageOverrides
from client.outputs import check_folder, write_outputs
from client.retry import NO_RETRY
from common.diffusion.randomness import MAX_SEED
from common.images import contact_sheet, encode_png, over_color, rasterize
from common.prompt import MAX_PROMPT_CHARACTERS
from common.scenes import WHITE
from common.stages import stage
from deploy.local.knowledge_base import ensure_knowledge_base
from deploy.local.stack import GeneratorFlags, running_stack

NEIGHBORS = "neighbors.png"
SHEET_CELL = 320  # pixels; wide enough for a caption above it
_GUIDANCE = {
    "guidance_strategy": "strategy",
    "text_weight": "text_weight",
    "neighbor_weight": "neighbor_weight",
    "eta": "eta",
}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where things are.

    Attributes:
        out: folder of the pictures.
        work: folder of the demonstration knowledge base.
        logs: folder of the services' logs.
    """

    out: Path
    work: Path
    logs: Path


def check_request(request: GenerationRequest) -> None:
    """Refuse at once what needs no service to be refused.

    Raises:
        BadInput: names the flag.
    """
    if not (request.prompt.strip() or request.record_json):
        raise BadInput("--prompt: is empty")
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        raise BadInput(f"--prompt: {len(request.prompt)} characters, at most {MAX_PROMPT_CHARACTERS} are read")
    for seed in (*request.seeds, *(() if request.seed is None else (request.seed,))):
        if not 0 <= seed <= MAX_SEED:
            raise BadInput(
                f"{'--seeds' if request.seeds else '--seed'}: {seed} is not between 0 and {MAX_SEED} (2^63 - 1)"
            )
    for overrides in request.stages:
        _check_overrides(overrides)


def _check_overrides(overrides: StageOverrides) -> None:
    given = {name: value for name, value in vars(overrides).items() if value is not None and name != "stage"}
    plan = stage(overrides.stage).plan(seed=0)
    guidance = {_GUIDANCE[name]: value for name, value in given.items() if name in _GUIDANCE}
    others: dict[str, Any] = {name: value for name, value in given.items() if name not in _GUIDANCE}
    try:
        replace(plan, guidance=replace(plan.guidance, **guidance), **others)
    except ValueError as error:
        name, _, reason = str(error).removeprefix("guidance.").partition(": ")
        raise BadInput(f"--{name.replace('_', '-')}-{overrides.stage}: {reason}") from None


def generate(
    request: GenerationRequest, places: Places, flags: GeneratorFlags, display: Display, *, timeout_s: float
) -> list[Path]:
    """Draw a picture with a stack of our own; gives the files that are left in `places.out`.

    Raises:
        BadInput, FieldError: the request cannot be.
        ChildFailed: a service cannot start, e.g. for want of weights.
        GenerationFailed: the generator refuses, or fails.
        CorpusError, FolderInUse, LibraryError, OSError: the knowledge base cannot be made or is in use, or the files cannot be
            written.
    """
    started = time.perf_counter()
    check_request(request)
    check_folder(places.out)
    library = ensure_knowledge_base(places.work, display)
    display.say("starting retrieval and generation")
    launched = time.perf_counter()
    with running_stack(library, flags, places.logs) as stack:
        start_s = time.perf_counter() - launched
        try:
            every = replace(request, every_stage=True)
            drawn = _draw(every, stack.address, Watch(display, places.out), timeout_s)
        except GenerationFailed as error:
            if error.code == "UNAVAILABLE":
                stack.generator.check()
            if error.code == "INTERNAL":
                raise GenerationFailed("INTERNAL", f"{error}: {stack.generator.explain()}") from error
            raise
        files = image_files(drawn) | stage_files(drawn)
        if drawn.neighbors.neighbors:
            files[NEIGHBORS] = encode_png(_sheet(drawn.neighbors.neighbors))
    record = dict(drawn.record)
    record["timings_s"] = {
        "start": round(start_s, 4),
        **record["timings_s"],
        "command": round(time.perf_counter() - started, 4),
    }
    return write_outputs(places.out, files | record_file(record), companions=(*COMPANIONS, NEIGHBORS))


def _draw(request: GenerationRequest, address: str, watch: Watch, timeout_s: float) -> Generation:
    with Client(address, retry=NO_RETRY) as client:
        return client.generate(request, on_event=watch, timeout_s=timeout_s)


def _sheet(neighbors: tuple[Neighbor, ...]) -> np.ndarray:
    """The neighbors under their captions, best first."""
    pictures = [over_color(rasterize(n.image, n.image_format, SHEET_CELL), WHITE) for n in neighbors]
    labels = [f"{neighbor.rank}. {neighbor.caption}" for neighbor in neighbors]
    return contact_sheet([[picture] for picture in pictures], labels, cell=SHEET_CELL)
