"""`python -m retrieval_svc restore`: a knowledge base from a snapshot."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.service.errors import InvalidArgument
from retrieval_svc.snapshot import SnapshotError, restore

EXPECTED = (InvalidArgument, SnapshotError)


def add_restore_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `restore` to the commands; its body is `restore_snapshot`."""
    parser = commands.add_parser(
        "restore",
        help="make a knowledge base from a snapshot",
        description="Check a snapshot, and make a knowledge base of a library from it. No service has the library open.",
    )
    parser.set_defaults(body=restore_snapshot)
    parser.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="its folder: SNAPSHOTS/NAME/GENERATION")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="the library; made if it is not there"
    )
    parser.add_argument("--knowledge-base", required=True, metavar="NAME", help="of the new knowledge base")


def restore_snapshot(flags: argparse.Namespace) -> None:
    """Restore, and print where it is.

    Raises:
        one of `EXPECTED`, or OSError: the snapshot is damaged, the name is taken or cannot be, the library is in use.
    """
    print(restore(flags.snapshot, flags.data, flags.knowledge_base))
