"""A restore drill on a library: save a knowledge base, delete it, restore it, and compare what it answers.

On a copy: the library that is named is read, and locked for as long as that takes; everything else happens in a folder that is
thrown away. So it can be run against last night's copy of a real library as well as against the demonstration's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.knowledge_base import KnowledgeBases
from client.retrieval_types import Lookup
from deploy.local.children import ROOT, Child, running

LOCK = "lock"
K = 5


class DrillFailed(RuntimeError):
    """What came back is not what was saved."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A drill that went well.

    Attributes:
        generation, num_pairs, num_bytes: of the snapshot.
        lookups: that were answered the same, by every method that answered before.
    """

    generation: int
    num_pairs: int
    num_bytes: int
    lookups: int


def drill(library: Path, name: str, *, lookups: int = 50) -> Report:
    """Save, delete, restore and compare.

    Args:
        library: folder with the knowledge base `name`; no service has it open.
        lookups: captions of the knowledge base's own that are looked up before and after.

    Raises:
        ValueError: there is no such library, or its knowledge base holds nothing.
        DrillFailed: the pairs or an answer differ, or the restore was refused.
    """
    if not library.is_dir():
        raise ValueError(f"library: {library} is no folder")
    with tempfile.TemporaryDirectory(prefix="restore-drill-") as folder:
        work = Path(folder)
        copy, snapshots = work / "library", work / "snapshots"
        shutil.copytree(library, copy)
        for lock in copy.rglob(LOCK):
            lock.unlink()
        with served(copy, snapshots, work) as bases:
            prompts = [pair.caption for pair in bases.list_pairs(name)][:lookups]
            if not prompts:
                raise ValueError(f"knowledge base: {name!r} holds nothing")
            before, ids = answers(bases, name, prompts), pair_ids(bases, name)
            made = bases.snapshot(name)
            bases.delete(name)
            if any(base.name == name for base in bases.list()):
                raise DrillFailed(f"{name} is there after it was deleted")
        _restore(snapshots / name / str(made.generation), copy, name)
        with served(copy, snapshots, work) as bases:
            if pair_ids(bases, name) != ids:
                raise DrillFailed(f"{name} came back with other pairs than were saved")
            for prompt, was, now in zip(prompts, before, answers(bases, name, prompts), strict=True):
                if was != now:
                    raise DrillFailed(f"{prompt!r} found {was} before, and {now} after")
    return Report(generation=made.generation, num_pairs=made.num_pairs, num_bytes=made.num_bytes, lookups=len(prompts))


def answers(bases: KnowledgeBases, name: str, prompts: Sequence[str]) -> list[list[str]]:
    """The ids that each prompt finds, best first."""
    found = (bases.retrieve(Lookup(prompt=prompt, knowledge_base=name, k=K)) for prompt in prompts)
    return [[neighbor.pair.pair_id for neighbor in answer.neighbors] for answer in found]


def pair_ids(bases: KnowledgeBases, name: str) -> set[str]:
    """Of all its pairs."""
    return {pair.pair_id for pair in bases.list_pairs(name)}


@contextmanager
def served(library: Path, snapshots: Path, work: Path) -> Iterator[KnowledgeBases]:
    """A service of a library while the block runs, with its socket and its log in `work`."""
    address = f"unix:{work}/retrieval.sock"
    flags = {"data": library, "snapshots": snapshots, "address": address, "log-level": "warning"}
    arguments = ["retrieval_svc", "serve", *(f"--{flag}={value}" for flag, value in flags.items())]
    with running([Child("retrieval", arguments, work / "log")]), KnowledgeBases(address) as bases:
        yield bases


def _restore(snapshot: Path, library: Path, name: str) -> None:
    command = [sys.executable, "-m", "retrieval_svc", "restore", str(snapshot)]
    command += [f"--data={library}", f"--knowledge-base={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise DrillFailed(f"restore: {done.stderr}")
