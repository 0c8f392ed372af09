"""`python -m deploy.k8s.snapshots`: has every knowledge base of a retrieval service saved, and lets go of old ones."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from client.channel import Tls
from client.knowledge_base import KnowledgeBases, RetrievalFailed
from common.service.command import run_command

TIMEOUT_S = 4 * 3600.0
EXPECTED = (RetrievalFailed, ValueError, OSError)
SOME_NOT_SAVED = 3  # the Job is not tried again: it would save the others anew, and their older nights would go
ATTEMPTS = 2  # at a knowledge base, in one run


def main(arguments: Sequence[str] | None = None) -> int:
    """Save once; gives the exit status: with one line on standard error 2 where nothing was saved, 3 where some were."""
    flags = parser().parse_args(arguments)
    saved: list[str] = []
    status = run_command("deploy.k8s.snapshots", partial(_save_all, flags, saved), expected=EXPECTED)
    return SOME_NOT_SAVED if status and saved else status


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.k8s.snapshots", description=__doc__)
    made.add_argument("--retrieval", required=True, metavar="ADDRESS", help="host:port or dns:///host:port")
    made.add_argument("--snapshots", type=Path, required=True, metavar="FOLDER", help="where the service makes them")
    made.add_argument("--keep", type=int, default=7, metavar="N", help="of each knowledge base (default: %(default)s)")
    made.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds an admin key")
    made.add_argument("--tls-ca-file", type=Path, metavar="FILE", help="PEM certificates of the service's authority")
    return made


def _save_all(flags: argparse.Namespace, saved: list[str]) -> None:
    """Note each knowledge base in `saved` as soon as it is."""
    if flags.keep < 1:
        raise ValueError(f"--keep: {flags.keep} is not positive")
    key = flags.api_key_file.read_text().split()[0] if flags.api_key_file else ""
    tls = Tls(roots=flags.tls_ca_file.read_bytes()) if flags.tls_ca_file else None
    with KnowledgeBases(flags.retrieval, api_key=key, tls=tls, timeout_s=TIMEOUT_S) as bases:
        left, kept = [base.name for base in bases.list()], list[str]()
        for _ in range(ATTEMPTS):
            failed: dict[str, RetrievalFailed] = {}
            for name in left:
                try:
                    made = bases.snapshot(name)
                except RetrievalFailed as error:  # the others are saved all the same
                    failed[name] = error
                    continue
                saved.append(name)
                print(
                    f"{name}: generation {made.generation}, {made.num_pairs} pairs, {made.num_bytes} bytes", flush=True
                )
                try:
                    for old in outdated(flags.snapshots / name, flags.keep):
                        shutil.rmtree(old)
                except OSError as error:
                    kept.append(f"not removed: {error.filename}: {error.strerror}")
            left = list(failed)
    if faults := [*(f"not saved: {name}: {error}" for name, error in failed.items()), *kept]:
        raise ValueError("; ".join(faults))


def outdated(folder: Path, keep: int) -> list[Path]:
    """The snapshots of a knowledge base but the newest `keep`; they are named by their generations, which ascend."""
    generations = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(generations, key=lambda path: int(path.name))[:-keep]


if __name__ == "__main__":
    sys.exit(main())
