"""The command that builds an image, for docker and podman: what it begins with is given by digest, what it is by labels."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from common.version import VERSION
from deploy.images.catalog import IMAGES, ROOT, dockerfile


def build_arguments(
    image: str, digests: Mapping[str, str], *, lock: str = "", snapshot: str = "", revision: str, created: str
) -> dict[str, str]:
    """The arguments of an image's build by their names: those that its Dockerfile declares, each with a value.

    Args:
        digests: of the bases, by argument.
        lock: another one than the image's first.
        snapshot: the day of Debian's archive, such as 20261101T000000Z, for images that are made of Debian.
        revision, created: of the source.

    Raises:
        ValueError: a lock that the image has not, or a base or the day is not given.
    """
    locks = IMAGES[image]
    if lock and lock not in locks:
        raise ValueError(f"lock: {lock!r} is none of {image}'s: {', '.join(locks) or 'it has none'}")
    given = {"VERSION": VERSION, "REVISION": revision, "CREATED": created, **digests}
    if locks:
        given["LOCK"] = lock or locks[0]
    if snapshot:
        given["DEBIAN_SNAPSHOT"] = snapshot
    declared = declared_arguments(dockerfile(image))
    missing = [name for name, default in declared.items() if default is None and not given.get(name)]
    if missing:
        raise ValueError(
            f"{image}: {', '.join(missing)} must be given: image-digests finds digests, --snapshot says the day"
        )
    return {name: given[name] for name in declared if name in given}


def declared_arguments(recipe: Path) -> dict[str, str | None]:
    """The arguments that a Dockerfile declares, with their defaults; None for those that must be given."""
    found: dict[str, str | None] = {}
    for line in recipe.read_text().splitlines():
        if line.startswith("ARG "):
            name, separator, default = line.removeprefix("ARG ").strip().partition("=")
            found[name] = found.get(name) or (default if separator else None)
    return found


def build_command(
    engine: str, image: str, tag: str, arguments: Mapping[str, str], *, context: Path = ROOT
) -> list[str]:
    """What is run; the context is the repository, or for `models` the model repository.

    Raises:
        ValueError: `models` are to be made of a folder that is no model repository.
    """
    if image == "models" and not any(context.glob("*/config.pbtxt")):
        raise ValueError(f"--context: {context} is no model repository, which `python -m generator_svc export` makes")
    command = [engine, "build", "--file", str(dockerfile(image)), "--tag", tag, "--platform", "linux/amd64"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    return [*command, str(context)]


def source_revision() -> tuple[str, str]:
    """The commit of this source and its time (RFC 3339); `-dirty` where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    commit, seconds = git("rev-parse", "HEAD"), git("show", "-s", "--format=%ct", "HEAD")
    if not commit:
        return "unknown", "unknown"
    changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return commit + changed, datetime.fromtimestamp(int(seconds), UTC).isoformat()


def run_build(command: list[str], created: str) -> None:
    """Build, with the source's time for that of every file where the engine knows SOURCE_DATE_EPOCH.

    Raises:
        ValueError: the engine says no.
    """
    epoch = str(int(datetime.fromisoformat(created).timestamp())) if created != "unknown" else "0"
    if subprocess.run(command, env={**os.environ, "SOURCE_DATE_EPOCH": epoch}).returncode != 0:
        raise ValueError(f"build: {command[0]} could not build it; what it says stands above")
