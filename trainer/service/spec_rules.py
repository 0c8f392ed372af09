"""Runs are checked before anything is started: what can be wrong is refused here, by the name of a field.

A run is checked when it is asked for, and again when its turn comes: records lie where pods, too, can write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.service.errors import InvalidArgument
from trainer.presets import PRESETS
from trainer.service.run_spec import ExecutorKind, PodResources, RunSpec

MAX_NAME = 40
MAX_RANKS, MAX_THREADS, MAX_PATH = 4096, 1024, 500
MAX_PODS = 1000
MAX_PART_BYTES = 255  # of a path: NAME_MAX of Linux file systems
_NAME = re.compile(rf"[a-z]([a-z0-9-]{{0,{MAX_NAME - 2}}}[a-z0-9])?")
_STATE = re.compile(r"state-\d+\.(safetensors|damaged)")
_OF_RUNS = {"service", "log.jsonl"}  # `run.json` and `lock` are other things' as well
_PREPARED, _MANIFEST = "prepared.json", "manifest.json"  # what makes a folder a prepared corpus, and weights

OF_OTHERS = {_PREPARED, _MANIFEST, "corpus.json"}
"""Files that are never a run's."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the service keeps runs, and under which it finds prepared corpora and writes weights."""

    runs: Path
    data: Path
    weights: Path

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.runs / name


def check_name(name: str) -> None:
    """Raises InvalidArgument where `name` cannot be one of a run."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            "run",
            f"{name!r} is not 1 to {MAX_NAME} of a-z, 0-9, hyphen that begin with a letter and end with a letter or digit",
        )


def check_folder(folder: Path) -> None:
    """Raises InvalidArgument where a new run would have to share its folder: it is deleted with the run.

    Runs, prepared corpora and weights may lie side by side. A folder that `fit` has filled is a run's.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if found & OF_OTHERS or (found and not (found & _OF_RUNS or any(map(_STATE.fullmatch, found)))):
        raise InvalidArgument("run", f"{folder.name!r} is the name of a folder that holds something else than a run")


def check_spec(spec: RunSpec, folders: Folders) -> None:
    """Raises InvalidArgument, which names the field and the value, where a run cannot be as `spec`, with its executor, says."""
    if spec.preset not in PRESETS:
        raise InvalidArgument("spec.preset", f"{spec.preset!r} is not one of {', '.join(sorted(PRESETS))}")
    folder = inside("spec.data", spec.data, folders.data, "data")
    if not (folder / _PREPARED).is_file():
        raise InvalidArgument("spec.data", f"{spec.data!r} holds no prepared corpus under the service's data folder")
    if spec.start_from:
        folder = inside("spec.start_from", spec.start_from, folders.weights, "weights")
        if not (folder / _MANIFEST).is_file():
            raise InvalidArgument(
                "spec.start_from", f"{spec.start_from!r} holds no weights under the service's weights folder"
            )
    row = PRESETS[spec.preset]
    if spec.examples > row.total_examples:
        raise InvalidArgument("spec.examples", f"{spec.examples} is more than the preset's {row.total_examples}")
    _check_most("spec.ranks", spec.ranks, MAX_RANKS)
    if spec.num_ranks * row.accumulation > row.groups:
        raise InvalidArgument(
            "spec.ranks",
            f"{spec.ranks} ranks x {row.accumulation} parts are more than the {row.groups} neighbor sets of a step",
        )
    if spec.parallel and spec.num_ranks == 1:
        raise InvalidArgument("spec.parallel", "would change nothing: there is one rank")
    _check_most("spec.threads", spec.threads, MAX_THREADS)
    if spec.side and (spec.side % row.unet.granularity or spec.side > row.stage):
        raise InvalidArgument(
            "spec.side",
            f"{spec.side} is not a multiple of {row.unet.granularity} up to {row.stage}, as {row.name} needs",
        )
    _check_pod(spec)


def total_examples(spec: RunSpec) -> int:
    """Examples at which a run ends; 0: its preset is not known any more."""
    total = PRESETS[spec.preset].total_examples if spec.preset in PRESETS else 0
    return min(spec.examples or total, total)


def inside(field: str, text: str, root: Path, what: str) -> Path:
    """The folder `text` under `root`.

    Raises:
        InvalidArgument: it is none, or leads out of it.
    """
    path = PurePosixPath(text)
    if not text or len(text) > MAX_PATH or not text.isprintable():
        raise InvalidArgument(field, "is not the name of a folder" if text else "is missing")
    if path.is_absolute() or ".." in path.parts or str(path) == ".":
        raise InvalidArgument(field, f"{text!r} is not a folder under the service's {what} folder")
    for part in path.parts:
        if len(part.encode()) > MAX_PART_BYTES:
            raise InvalidArgument(field, f"{part!r} is longer than the {MAX_PART_BYTES} bytes of a folder's name")
    return root / path


def _check_pod(spec: RunSpec) -> None:
    if spec.executor == ExecutorKind.LOCAL:
        if spec.pod != PodResources():
            raise InvalidArgument("spec.pod", "would change nothing: the run is local")
        return
    if spec.num_ranks % (spec.pod.ranks or 1):
        raise InvalidArgument("spec.pod.ranks", f"{spec.pod.ranks} does not divide {spec.num_ranks} ranks")
    if spec.num_pods > MAX_PODS:
        raise InvalidArgument("spec.ranks", f"{spec.num_ranks} need {spec.num_pods} pods; at most {MAX_PODS} are taken")


def _check_most(field: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidArgument(field, f"{number} is more than {most}")
