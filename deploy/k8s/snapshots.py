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


def main(arguments: Sequence[str] | None = None) -> int:
    """Save once; gives the exit status (2 and one line on standard error where a knowledge base is not saved)."""
    flags = parser().parse_args(arguments)
    return run_command("deploy.k8s.snapshots", partial(_save_all, flags), expected=EXPECTED)


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.k8s.snapshots", description=__doc__)
    made.add_argument("--retrieval", required=True, metavar="ADDRESS", help="host:port or dns:///host:port")
    made.add_argument("--snapshots", type=Path, required=True, metavar="FOLDER", help="where the service makes them")
    made.add_argument("--keep", type=int, default=7, metavar="N", help="of each knowledge base (default: %(default)s)")
    made.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds an admin key")
    made.add_argument("--tls-ca-file", type=Path, metavar="FILE", help="PEM certificates of the service's authority")
    return made


def _save_all(flags: argparse.Namespace) -> None:
    if flags.keep < 1:
        raise ValueError(f"--keep: {flags.keep} is not positive")
    key = flags.api_key_file.read_text().split()[0] if flags.api_key_file else ""
    tls = Tls(roots=flags.tls_ca_file.read_bytes()) if flags.tls_ca_file else None
    failed: list[str] = []
    with KnowledgeBases(flags.retrieval, api_key=key, tls=tls, timeout_s=TIMEOUT_S) as bases:
        for base in bases.list():
            try:
                made = bases.snapshot(base.name)
            except RetrievalFailed as error:  # the others are saved all the same
                failed.append(f"{base.name}: {error}")
                continue
            print(
                f"{base.name}: generation {made.generation}, {made.num_pairs} pairs, {made.num_bytes} bytes", flush=True
            )
            for old in outdated(flags.snapshots / base.name, flags.keep):
                shutil.rmtree(old)
    if failed:
        raise ValueError(f"not saved: {'; '.join(failed)}")


def outdated(folder: Path, keep: int) -> list[Path]:
    """The snapshots of a knowledge base but the newest `keep`; they are named by their generations, which ascend."""
    generations = [path for path in folder.glob("*") if path.is_dir() and path.name.isdecimal()]
    return sorted(generations, key=lambda path: int(path.name))[:-keep]


if __name__ == "__main__":
    sys.exit(main())
