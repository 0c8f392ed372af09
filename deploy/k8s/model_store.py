"""`python -m deploy.k8s.model_store`: whether a model repository that was copied here is, byte by byte, the one released.

Each version's manifest gives the sha256 of its weights; the digest of a repository is that of all its manifests, adapters
and configurations by their paths. It is printed where none is given, for whoever releases.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.checkpoint import MANIFEST, CheckpointError, read_manifest
from common.files import sha256_file
from common.service.command import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Check once; gives the exit status (2 and one line on standard error where something differs)."""
    flags = parser().parse_args(arguments)
    body = partial(_check, flags.repository, flags.sha256)
    return run_command("deploy.k8s.model_store", body, expected=(CheckpointError,))


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.k8s.model_store", description=__doc__)
    made.add_argument("repository", type=Path, metavar="FOLDER")
    made.add_argument("--sha256", default="", metavar="DIGEST", help="that it must have; empty: print it")
    return made


def _check(repository: Path, wanted: str) -> None:
    digest = repository_sha256(repository)
    if wanted and digest != wanted:
        raise CheckpointError(f"repository: {repository} is {digest}, not the {wanted} that was released")
    print(digest)


def repository_sha256(repository: Path) -> str:
    """The digest of a repository, all of whose files are what its versions' manifests say; hexadecimal.

    Raises:
        CheckpointError: there is no version, a file is missing, altered, or of no version.
    """
    versions = sorted(path.parent for path in repository.glob(f"*/*/{MANIFEST}"))
    if not versions:
        raise CheckpointError(f"repository: {repository} holds no version of a model")
    weights: set[Path] = set()
    for version in versions:
        for name, line in read_manifest(version).items():
            path = version / name
            if not path.is_file() or sha256_file(path) != line["sha256"]:
                raise CheckpointError(f"repository: {path} is missing, or not what its manifest says")
            weights.add(path)
    rest = sorted(path for path in repository.rglob("*") if path.is_file() and path not in weights)
    lines = [f"{path.relative_to(repository).as_posix()} {sha256_file(path)}\n" for path in rest]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
