"""The versions of a model in a repository: which one is served, going back to another, letting old ones go.

`<repository>/unet_64/config.pbtxt` names the one version that Triton serves; each version keeps the configuration that it
was published with, so that going back is one file written in place of another.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import MANIFEST, CheckpointError, read_manifest
from common.files import sha256_file, sync_folder, write_atomic

CONFIG, CARD = "config.pbtxt", "card.json"
_SERVED = re.compile(r"^version_policy \{ specific \{ versions: \[(\d+)\] \} \}$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A version that was published.

    Attributes:
        number: of the version.
        is_served: whether Triton serves it, or will once it loads the model again.
        card: what it is, see `export.card_of`; empty for a model that has none.
    """

    number: int
    is_served: bool
    card: dict[str, Any]


@contextmanager
def alone(repository: Path) -> Iterator[None]:
    """Hold a repository while it is changed: two exports at once would give one number to two versions.

    Raises:
        CheckpointError: another process holds it.
    """
    repository.mkdir(parents=True, exist_ok=True)
    with (repository / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"repository: {repository} is being changed by another process") from None
        yield


def version_policy(version: int) -> str:
    """The line of config.pbtxt by which this version alone is served."""
    return f"version_policy {{ specific {{ versions: [{version}] }} }}\n"


def numbers(model: Path) -> list[int]:
    """The versions in a model's folder, ascending."""
    return sorted(int(path.name) for path in model.glob("*") if path.name.isdecimal() and path.is_dir())


def served_version(model: Path) -> int | None:
    """The version that the model's configuration names; None where there is no configuration.

    Raises:
        CheckpointError: the configuration names none.
    """
    try:
        found = _SERVED.search((model / CONFIG).read_text())
    except FileNotFoundError:
        return None
    if found is None:
        raise CheckpointError(f"repository: {model / CONFIG} names no version to serve; publish the model again")
    return int(found.group(1))


def configurations(repository: Path) -> dict[str, str]:
    """The configuration of each model of a repository; of one that is not there yet, none."""
    return {path.parent.name: path.read_text() for path in sorted(repository.glob(f"*/{CONFIG}"))}


def list_versions(model: Path) -> list[ModelVersion]:
    """The model's versions, ascending.

    Raises:
        CheckpointError: the repository holds no such model, or a file of it cannot be read.
    """
    if not (model / CONFIG).is_file():
        raise CheckpointError(f"repository: {model.parent} holds no model {model.name!r}")
    served = served_version(model)
    return [ModelVersion(number=n, is_served=n == served, card=_card(model / str(n))) for n in numbers(model)]


def serve_version(model: Path, version: int) -> None:
    """Make the configuration name this version.

    Raises:
        CheckpointError: it is not there, or its files are not what its manifest says.
    """
    folder = model / str(version)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"repository: {model} holds no version {version}; it has {numbers(model)}")
    check_version(folder)
    write_atomic(model / CONFIG, (folder / CONFIG).read_text())


def roll_back(model: Path, version: int | None = None) -> int:
    """Serve an older version: the one asked for, or the newest before the served one; gives its number.

    Raises:
        CheckpointError: there is none, or it is damaged; what is served stays.
    """
    served = next((each.number for each in list_versions(model) if each.is_served), 0)
    if version is None:
        version = max((n for n in numbers(model) if n < served), default=None)
        if version is None:
            raise CheckpointError(f"repository: {model} holds no version before {served}")
    serve_version(model, version)
    return version


def check_version(folder: Path) -> None:
    """See that a version's files are those that were published.

    Raises:
        CheckpointError: one is missing, or has other content.
    """
    for name, line in read_manifest(folder).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"repository: {folder / name} is missing")
        if sha256_file(folder / name) != line["sha256"]:
            raise CheckpointError(f"repository: {folder / name} is not what {MANIFEST} says")


def prune(model: Path, keep: int) -> list[int]:
    """Remove all versions but the newest `keep` and the one that is served; gives what was removed.

    A Triton that still draws with one of them has it in its memory.
    """
    kept = {*numbers(model)[-keep:], served_version(model)}
    gone = [n for n in numbers(model) if n not in kept]
    for number in gone:
        retired = model / f".{number}.old"
        shutil.rmtree(retired, ignore_errors=True)  # what a prune that was interrupted has left
        os.replace(model / str(number), retired)
        shutil.rmtree(retired)
    sync_folder(model)
    return gone


def _card(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CARD).read_text())
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"repository: {folder / CARD} is not JSON ({error})") from None
