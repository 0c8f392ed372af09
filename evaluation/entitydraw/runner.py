"""Draws what a run lacks, by calls to a generator, and keeps it; see `results` for what counts."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from client import Client, GenerationFailed
from client.generation_types import Generation
from client.picture_record import read_record
from common.files import write_atomic
from common.version import VERSION
from evaluation.entitydraw.progress import Progress
from evaluation.entitydraw.requests import Asked, asked, seeds_of
from evaluation.entitydraw.results import NeighborRow, PictureRow, RunError, RunFolder
from evaluation.entitydraw.suite_file import Suite
from evaluation.entitydraw.systems import System, SystemInvalid

PICTURES = 4  # of a prompt, as in the paper
CALL_S = 600.0
PATIENCE_S = 300.0  # a generator that is full or away is asked again for as long
PAUSE_S = 1.0
_PATIENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is drawn.

    Attributes:
        prompts: of the suite, as many; 0: all.
        pictures: of each prompt.
        calls: at once.
        command: that makes the run again.
    """

    prompts: int = 0
    pictures: int = PICTURES
    calls: int = 2
    command: str = ""

    def __post_init__(self) -> None:
        for name, least in (("prompts", 0), ("pictures", 1), ("calls", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")
        if self.pictures > 8:
            raise ValueError(f"pictures: {self.pictures} is more than 8, which one call draws")


@dataclass(frozen=True, kw_only=True)
class _Call:
    """The pictures of one prompt that are not there."""

    asked: Asked
    seeds: tuple[int, ...]


def run_suite(
    suite: Suite,
    systems: Sequence[System],
    client: Client,
    folder: RunFolder,
    settings: RunSettings,
    progress: Progress,
) -> int:
    """Draw every picture of `systems` that `folder` lacks; gives how many were drawn.

    Raises:
        RunError: the folder holds pictures of another suite, of other weights, or of another system by the same name.
        SuiteError: a system needs references that the suite does not have.
        SystemInvalid: a system's value is none that the generator can be asked for.
        GenerationFailed: the generator refused, or failed for longer than PATIENCE_S; what was drawn stays.
    """
    prompts = suite.part(settings.prompts)
    # Prompt by prompt: of a run that is stopped, all systems have drawn nearly the same prompts.
    wanted = [asked(suite, system, prompt) for prompt in prompts for system in systems]
    _begin(folder, suite, systems, client, settings, len(prompts))
    rows = {row.key: row for row in folder.rows()}
    calls: list[_Call] = []
    for each in wanted:
        missing: list[int] = []
        for seed in seeds_of(suite, each.prompt, settings.pictures):
            key = (each.system.name, each.prompt.id, seed)
            if not folder.picture_file(*key).is_file():
                missing.append(seed)
            elif key not in rows:
                rows[key] = _row(folder, each, seed, None)
        if missing:
            calls.append(_Call(asked=each, seeds=tuple(missing)))
    folder.write_rows(rows.values())
    total = len(wanted) * settings.pictures
    drawn = _draw_all(calls, client, folder, settings.calls, total, progress)
    folder.write_rows(folder.rows())
    folder.write_run({**folder.read_run(), "finished": _now()})
    return drawn


def _draw_all(
    calls: Sequence[_Call], client: Client, folder: RunFolder, at_once: int, total: int, progress: Progress
) -> int:
    """The calls, some at once; after the first that fails no other begins."""
    lock, stopped = threading.Lock(), threading.Event()
    lacking = sum(len(call.seeds) for call in calls)
    drawn = 0
    progress("pictures", total - lacking, total)

    def draw(call: _Call) -> None:
        nonlocal drawn
        if stopped.is_set():
            return
        try:
            started = time.monotonic()
            generation = _draw(call, client, stopped)
            seconds = (time.monotonic() - started) / len(call.seeds)
            with lock:
                _keep(folder, call, generation, round(seconds, 4))
                drawn += len(call.seeds)
                progress("pictures", total - lacking + drawn, total)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(draw, call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        for future in futures:
            if future.done() and not future.cancelled():
                future.result()
    return drawn


def _patiently(ask: Callable[[], T], stopped: threading.Event) -> T:
    """What `ask` gives; while the generator is full or away, it is asked again."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask()
        except GenerationFailed as error:
            pause_s = error.retry_after_s or PAUSE_S
            if error.code not in _PATIENT or time.monotonic() + pause_s > give_up or stopped.wait(pause_s):
                raise


def _draw(call: _Call, client: Client, stopped: threading.Event) -> Generation:
    request = call.asked.request(call.seeds)
    try:
        return _patiently(lambda: client.generate(request, timeout_s=CALL_S), stopped)
    except GenerationFailed as error:
        where = f"system {call.asked.system.name!r}, prompt {call.asked.prompt.id!r}"
        raise GenerationFailed(error.code, f"{where}: {error.description}") from error
    except ValueError as error:  # a value that no request can hold
        raise SystemInvalid(f"system {call.asked.system.name!r}: {error}") from None


def _keep(folder: RunFolder, call: _Call, generation: Generation, seconds: float) -> None:
    """References first, then the pictures, then their rows: what is named is there."""
    for neighbor in generation.neighbors.neighbors:
        if neighbor.pair_id:  # a reference comes back as the service reads it, and is kept as the suite has it
            folder.keep_reference(neighbor.image, neighbor.image_format)
    for reference in (*call.asked.references, *call.asked.prompt.entity.references):
        folder.keep_reference(reference.image, reference.image_format)
    for image in generation.images:
        write_atomic(folder.picture_file(call.asked.system.name, call.asked.prompt.id, image.seed), image.image)
        folder.append(_row(folder, call.asked, image.seed, seconds))


def _row(folder: RunFolder, each: Asked, seed: int, seconds: float | None) -> PictureRow:
    """The row of a picture that is there, from its own record."""
    prompt, entity = each.prompt, each.prompt.entity
    path = folder.picture_file(each.system.name, prompt.id, seed)
    content = path.read_bytes()
    try:
        record = json.loads(read_record(content))
    except ValueError as error:
        raise RunError(f"run: {path}: {error}") from None
    shown = (hashlib.sha256(reference.image).hexdigest() for reference in entity.references)
    return PictureRow(
        system=each.system.name,
        prompt_id=prompt.id,
        prompt=each.text,
        category=entity.category,
        entity=entity.name,
        frequency=entity.frequency,
        frequent=entity.frequent,
        seed=seed,
        file=folder.relative(path),
        sha256=hashlib.sha256(content).hexdigest(),
        neighbors=tuple(_neighbor(folder, said) for said in record["neighbors"]),
        suite_references=tuple(file for sha256 in shown if (file := folder.reference_by_sha256(sha256))),
        other=each.other.name if each.other else "",
        seconds=seconds,
    )


def _neighbor(folder: RunFolder, said: Mapping[str, Any]) -> NeighborRow:
    return NeighborRow(
        file=folder.reference_by_sha256(said["image_sha256"]),
        sha256=said["image_sha256"],
        **{
            name: said[name] for name in ("pair_id", "caption", "entity", "is_reference", "author", "source", "license")
        },
    )


def _begin(
    folder: RunFolder,
    suite: Suite,
    systems: Sequence[System],
    client: Client,
    settings: RunSettings,
    num_prompts: int,
) -> None:
    """Write `run.json`, or see that the one that is there goes with what is asked."""
    last = max(system.stop_at for system in systems)
    models = _patiently(client.models, threading.Event())
    generator = {
        "stages": [
            {
                "stage": m.stage,
                "weights_sha256": m.weights_sha256,
                "parameters": m.parameters,
                "trained": dict(m.trained),
            }
            for m in models.stages
            if m.stage <= last
        ],
        "text_encoder": models.text_encoder,
    }
    rows = {system.name: system.to_json() for system in systems}
    started = _now()
    if folder.run_file.exists():
        there = folder.read_run()
        started = there["started"]
        if folder.has_pictures():
            _check_same(folder, there, suite, generator)
        there["systems"] = {name: row for name, row in there["systems"].items() if folder.has_pictures(name)}
        for name, row in there["systems"].items():
            if rows.get(name, row) != row:
                raise RunError(f"run: {folder.run_file}: systems.{name}: is {row}, and {rows[name]} is asked for")
        rows = {**there["systems"], **rows}
    folder.write_run(
        {
            "suite": {"name": suite.name, "file": suite.file, "sha256": suite.sha256, "about": suite.about},
            "prompts": num_prompts,
            "pictures": settings.pictures,
            "systems": rows,
            "generator": generator,
            "versions": {"reimagen": VERSION, "python": platform.python_version()},
            "command": settings.command,
            "started": started,
            "finished": None,
        }
    )


def _check_same(folder: RunFolder, there: Mapping[str, Any], suite: Suite, generator: Mapping[str, Any]) -> None:
    if there["suite"]["sha256"] != suite.sha256:
        raise RunError(
            f"run: {folder.run_file}: suite.sha256: {there['suite']['sha256'][:12]} is not that of {suite.file}"
            f" ({suite.sha256[:12]}); another suite needs another folder"
        )
    before = {m["stage"]: m["weights_sha256"] for m in there["generator"]["stages"]}
    now = {m["stage"]: m["weights_sha256"] for m in generator["stages"]}
    if any(before.get(stage, sha256) != sha256 for stage, sha256 in now.items()):
        raise RunError(f"run: {folder.run_file}: generator.stages: other weights; they need another folder")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
