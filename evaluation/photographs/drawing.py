"""Draws the points of a sweep through a running generator, shard by shard, and goes on where it was."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client import Client, GenerationFailed
from client.picture_record import read_record
from common.files import write_atomic
from common.images import decode_rgb
from evaluation.photographs.local_copy import Prompt
from evaluation.photographs.measuring import Encoders, FeatureShards
from evaluation.photographs.protocol import SIDE, Sampling, SweepPoint

PATIENCE_S = 600.0  # a generator that is full or away is asked again for as long
PAUSE_S = 1.0
_PATIENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn and kept.

    Attributes:
        calls: to the generator, at once.
        timeout_s: deadline of one call.
        keep_pictures: of each point, so many; the others go when their features are kept. None: all.
    """

    client: Client
    sampling: Sampling
    calls: int
    timeout_s: float
    keep_pictures: int | None = None


def draw_point(
    folder: Path,
    point: SweepPoint,
    prompts: Sequence[Prompt],
    encoders: Encoders,
    drawing: Drawing,
    told: Callable[[int], None],
) -> FeatureShards:
    """Draw a point's pictures that are not there, and keep their features; `told` learns how many are done.

    Raises:
        GenerationFailed: the generator refused, or failed for longer than PATIENCE_S; what was drawn stays.
        ValueError: it has nothing that the weights of the 256 stage could guide.
    """
    shards = FeatureShards(folder, len(prompts))
    for number in range(len(shards)):
        rows = shards.rows(number)
        if not shards.path(number).is_file():
            part = prompts[rows.start : rows.stop]
            _draw_all(folder, point, part, drawing)
            files = [picture_file(folder, prompt) for prompt in part]
            found = encoders.features([_picture(path) for path in files], [prompt.text for prompt in part])
            shards.write(number, found | {"neighbors": np.array([_num_neighbors(path) for path in files])})
        if drawing.keep_pictures is not None:
            for prompt in prompts[max(rows.start, drawing.keep_pictures) : rows.stop]:
                picture_file(folder, prompt).unlink(missing_ok=True)
        told(rows.stop)
    return shards


def picture_file(folder: Path, prompt: Prompt) -> Path:
    """Where a point keeps a prompt's picture."""
    return folder / "pictures" / f"{prompt.number:06d}.png"


def _picture(path: Path) -> np.ndarray:
    try:
        picture = decode_rgb(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"pictures: {path} is damaged ({error}); remove it to draw it anew") from None
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"pictures: {path} is {picture.shape[0]} x {picture.shape[1]}, not {SIDE} x {SIDE}")
    return picture


def _num_neighbors(path: Path) -> int:
    """How many pairs shaped a picture, by its own record."""
    return len(json.loads(read_record(path.read_bytes()))["neighbors"])


def _draw_all(folder: Path, point: SweepPoint, prompts: Sequence[Prompt], drawing: Drawing) -> None:
    """Some calls at once; after the first that fails no other begins."""
    stopped = threading.Event()

    def draw(prompt: Prompt) -> None:
        if not stopped.is_set():
            write_atomic(picture_file(folder, prompt), _drawn(point, prompt, drawing, stopped))

    missing = [prompt for prompt in prompts if not picture_file(folder, prompt).is_file()]
    with ThreadPoolExecutor(drawing.calls) as pool:
        futures = [pool.submit(draw, prompt) for prompt in missing]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _drawn(point: SweepPoint, prompt: Prompt, drawing: Drawing, stopped: threading.Event) -> bytes:
    request = point.request(prompt.text, prompt.seed, prompt.excluded, drawing.sampling)
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            return drawing.client.generate(request, timeout_s=drawing.timeout_s).images[0].image
        except GenerationFailed as error:
            pause_s = error.retry_after_s or PAUSE_S
            if error.code in _PATIENT and time.monotonic() + pause_s < give_up and not stopped.wait(pause_s):
                continue
            refused = {violation.field for violation in error.violations}
            if point.weight_256 is not None and refused & {"stages[1].guidance_strategy", "stages[1].text_weight"}:
                raise ValueError(f"--weights-256: {error.description}; give `--weights-256 none`") from error
            where = f"{point.name}, prompt {prompt.key}"
            raise GenerationFailed(error.code, f"{where}: {error.description}", violations=error.violations) from error
