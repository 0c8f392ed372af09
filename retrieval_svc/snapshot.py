"""Copies of a knowledge base that can be checked and restored.

Layout: `<snapshots>/<name>/<generation>/` with the manifest, the copy of the pair store, the pictures (hard links where the
file system allows: they never change), and `snapshot.json`, which holds the sha256 of every file. The lexical index is
not copied: it is made again from the pairs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import replacing_folder, sha256_file, write_json
from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.folder_lock import FolderInUse, FolderLock
from retrieval_svc.knowledge_base_folder import num_bytes
from retrieval_svc.manifest import (
    IMAGES,
    PAIRS,
    KnowledgeBaseError,
    Manifest,
    check_name,
    read_manifest,
    write_manifest,
)
from retrieval_svc.pairs import PairStore

FORMAT = "reimagen-snapshot/1"
SNAPSHOT = "snapshot.json"
_PREFIX = 2  # hexadecimal digits of a picture's subfolder, as in image_store.py


class SnapshotError(ValueError):
    """The snapshot is missing, incomplete, altered, or cannot be restored there; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class SnapshotReport:
    """A snapshot that has been checked."""

    folder: Path
    name: str
    generation: int
    num_pairs: int
    num_bytes: int


def write_snapshot(
    snapshots: Path,
    *,
    pictures: Path,
    others_write: bool,
    store: PairStore,
    still: AbstractContextManager[object],
    state: Callable[[], tuple[Manifest, int]],
) -> SnapshotReport:
    """Write a snapshot and check it. One of the same generation that is there already is only checked.

    Args:
        snapshots: folder of all snapshots.
        pictures: folder of its image store. others_write: other processes than this one, too.
        still: while it is held nothing is written by this process; it is let go of before files are read for their checksums.
        state: manifest and generation.

    Raises:
        SnapshotError: a file is damaged.
        OSError: the disk is full.
    """
    with ExitStack() as held:
        held.enter_context(still)
        manifest, generation = state()
        target = snapshots / manifest.name / str(generation)
        if not target.exists():
            with replacing_folder(target) as made:
                num_pairs = store.count()
                _link_pictures(pictures, made / IMAGES)
                store.snapshot(made / PAIRS)
                if others_write:  # pictures that went meanwhile are in the copy, and so are those that came
                    _link_pictures(pictures, made / IMAGES)
                write_manifest(made, manifest)
                held.close()
                _seal(made, manifest, generation, num_pairs)
    return verify(target)


def verify(folder: Path) -> SnapshotReport:
    """Compare every file of a snapshot with its checksum.

    Raises:
        SnapshotError: a file is missing, altered, or was not there.
    """
    try:
        document = json.loads((folder / SNAPSHOT).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise SnapshotError(f"snapshot: {folder} has format {document['format']!r}, expected {FORMAT!r}")
        expected = dict(document["files"]) | {_picture(sha256): sha256 for sha256 in document["pictures"]}
        report = SnapshotReport(
            folder=folder,
            name=str(document["name"]),
            generation=int(document["generation"]),
            num_pairs=int(document["num_pairs"]),
            num_bytes=num_bytes(folder),
        )
    except SnapshotError:
        raise
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"snapshot: {folder / SNAPSHOT} cannot be read ({error!r})") from None
    found = dict(_files(folder))
    if missing := sorted(expected.keys() - found.keys()):
        raise SnapshotError(f"snapshot: {folder / missing[0]} is missing")
    if strange := sorted(found.keys() - expected.keys()):
        raise SnapshotError(f"snapshot: {folder / strange[0]} does not belong there")
    for name, path in sorted(found.items()):
        if (digest := sha256_file(path)) != expected[name]:
            raise SnapshotError(f"snapshot: {path} is altered (sha256 {digest[:12]}…, expected {expected[name][:12]}…)")
    return report


def restore(folder: Path, library: Path, name: str) -> Path:
    """Make knowledge base `name` of a library from a snapshot, which is checked first; gives its folder.

    It answers as the one that was copied; its lexical index is made when it is opened.

    Raises:
        SnapshotError: the snapshot is damaged, there is a knowledge base of this name, or the library is in use.
        InvalidArgument: the name cannot be.
        OSError: the disk is full.
    """
    check_name(name)
    verify(folder)
    target = library / name
    library.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.callback(FolderLock(library).close)
            manifest = read_manifest(folder)
        except (FolderInUse, KnowledgeBaseError) as error:
            raise SnapshotError(f"snapshot: {error}") from error
        if target.exists():
            raise SnapshotError(f"snapshot: {target} exists")
        with replacing_folder(target) as made:
            copy_folder(folder / PAIRS, made / PAIRS)
            _link_pictures(folder / IMAGES, made / IMAGES)
            write_manifest(made, replace(manifest, name=name))
    return target


def _seal(made: Path, manifest: Manifest, generation: int, num_pairs: int) -> None:
    """A picture's name is its checksum: it is taken at its word here, and read by `verify`."""
    found = dict(_files(made))
    pictures = sorted(path.parent.name + path.name for name, path in found.items() if name.startswith(f"{IMAGES}/"))
    document = {
        "format": FORMAT,
        "name": manifest.name,
        "uuid": manifest.uuid,
        "generation": generation,
        "num_pairs": num_pairs,
        "files": {n: sha256_file(path) for n, path in sorted(found.items()) if not n.startswith(f"{IMAGES}/")},
        "pictures": pictures,
    }
    write_json(made / SNAPSHOT, document)


def _picture(sha256: str) -> str:
    return f"{IMAGES}/{sha256[:_PREFIX]}/{sha256[_PREFIX:]}"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All but `snapshot.json`: path within the snapshot, and the file."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SNAPSHOT:
            yield name, path


def _link_pictures(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for folder in source.iterdir() if source.is_dir() else ():
        if len(folder.name) != _PREFIX:
            continue  # what is being written, and notes: not part of the content
        (target / folder.name).mkdir(exist_ok=True)
        for path in folder.iterdir():
            if not (target / folder.name / path.name).exists():
                _link(path, target / folder.name / path.name)


def _link(path: Path, target: Path) -> None:
    with suppress(FileNotFoundError):  # unlinked by another process meanwhile
        try:
            os.link(path, target)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(path, target)
