"""Rules for Dockerfiles and locks: each gives what is wrong, a line for each fault."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from packaging.markers import default_environment
from packaging.requirements import Requirement

from deploy.images.catalog import ROOT
from deploy.images.locks import Pin, normalized

LABELS = ("title", "description", "licenses", "version", "revision", "created")
OURS = ("common", "client", "retrieval_svc", "generator_svc", "trainer", "deploy")
GIVEN = ("reimagen", "triton_python_backend_utils")  # our stubs; Triton brings its own


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, its continued lines joined."""

    stage: int
    word: str
    rest: str


def steps(recipe: str) -> list[Step]:
    """The instructions of a Dockerfile; what stands before the first FROM is of stage 0."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in recipe.splitlines() if not line.lstrip().startswith("#")))
    found, stage = [], 0
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.strip().partition(" ")
        stage += word == "FROM"
        found.append(Step(stage, word, rest.strip()))
    return found


def recipe_faults(recipe: str, *, user: str, modules: tuple[str, ...], mounts: Collection[str] = ()) -> list[str]:
    """What a Dockerfile does not keep of the promises of deploy/k8s/README.md, "What an image has to bring".

    Args:
        user: UID:GID of the pods that run it.
        modules: `package` or `package.module` that their commands start.
        mounts: where they mount something.
    """
    told = steps(recipe)
    last = max(step.stage for step in told)
    final = [step for step in told if step.stage == last]
    faults = [f"{step.word} in the last stage wants a shell there" for step in final if step.word == "RUN"]
    if last < 2 and modules:
        faults.append("one stage: what builds it is in it")
    for step in told:
        if step.word == "FROM" and not re.match(r"(scratch|\S+@\$\{[A-Z]+_DIGEST\})( AS \w+)?$", step.rest):
            faults.append(f"FROM {step.rest} is not by a digest that must be given")
        if step.word == "ARG" and re.match(r"[A-Z]+_DIGEST=", step.rest):
            faults.append(f"ARG {step.rest}: a digest is looked up, not written down")
        if step.word == "ADD":
            faults.append("ADD fetches or unpacks")
    users = [step.rest for step in final if step.word == "USER"]
    if users != [user]:
        faults.append(f"USER {users} is not the pods' {user}")
    labels = " ".join(step.rest for step in final if step.word == "LABEL")
    faults += [f"no label {name}" for name in LABELS if f"org.opencontainers.image.{name}=" not in labels]
    copied = [step.rest.split()[0] for step in told if step.word == "COPY" and not step.rest.startswith("--from")]
    for module in modules:
        place = module.replace(".", "/")
        if module.partition(".")[0] in OURS and not any(
            place == name or place.startswith(f"{name}/") for name in copied
        ):
            faults.append(f"{module} is not copied")
    if any(step.word in ("ENTRYPOINT", "CMD") and not _is_list(step.rest) for step in final):
        faults.append("ENTRYPOINT or CMD wants a shell")
    return faults + [f"a pod mounts {mount} over {place}" for mount in mounts for place in hidden(final, mount)]


def hidden(final: Sequence[Step], mount: str) -> Iterator[str]:
    """What of an image's own a mount of this path would hide."""
    for step in final:
        place = step.rest.split()[-1]
        if step.word == "COPY" and place != "/" and PurePosixPath(place).is_relative_to(mount):
            yield place


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def lock_faults(
    pins: Mapping[str, Pin], names: Mapping[str, str], versions: Mapping[str, str], python: str
) -> list[str]:
    """What a lock has that it should not, or the reverse.

    Args:
        pins: of the lock.
        names: of the list that it was made of, with versions of their own.
        versions: of requirements.txt.
        python: that it is for.
    """
    faults = [f"{name} is not locked" for name in names if name not in pins]
    for name, pin in pins.items():
        wanted = names.get(name) or versions.get(name, pin.version)
        if pin.version != wanted or pin.version.partition("+")[0] != versions.get(name, pin.version).partition("+")[0]:
            faults.append(f"{name} is {pin.version}, requirements.txt says {versions.get(name)}")
        if not pin.hashes:
            faults.append(f"{name} has no hash")
    faults += [
        f"{asked} is asked for by {name} and not locked" for name, asked in _asked(pins, python) if asked not in pins
    ]
    return faults


def _asked(pins: Mapping[str, Pin], python: str) -> Iterator[tuple[str, str]]:
    """What locked packages ask for, as far as this environment has the same versions of them."""
    said = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for name, pin in pins.items():
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if here.version != pin.version:
            continue
        for line in here.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate(said):
                yield name, normalized(wanted.name)


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules that a file imports, by their whole names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reachable(modules: tuple[str, ...]) -> dict[str, str]:
    """What of others is imported, directly or not, by our modules: top name -> one of ours that imports it."""
    todo, seen, others = list(modules), set(), {}
    while todo:
        module = todo.pop()
        path = _source(module)
        if path is None or path in seen:
            continue
        seen.add(path)
        todo += [".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1)]
        for name in imports(path):
            top = name.partition(".")[0]
            if top in OURS:
                todo.append(name)
            elif top not in sys.stdlib_module_names and top not in GIVEN and top != "google":
                others[top] = module
    return others


def _source(module: str) -> Path | None:
    """A module's file; of a package `__init__.py`."""
    place = ROOT / module.replace(".", "/")
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def providers() -> Mapping[str, list[str]]:
    """Top name of a module -> the packages of this environment that bring it, normalized."""
    return {
        top: [normalized(name) for name in names] for top, names in importlib.metadata.packages_distributions().items()
    }
