"""`python -m deploy.operators`: how many replicas, how large a Qdrant, whether a snapshot comes back, and where it goes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from client.channel import Tls
from client.knowledge_base import KnowledgeBases, RetrievalFailed
from common.service.command import run_command
from common.service.errors import InvalidArgument
from deploy.local.children import ChildFailed
from deploy.operators.capacity import plan, read_curve
from deploy.operators.qdrant_size import PLANS, size
from deploy.operators.restore_drill import DrillFailed, drill
from deploy.operators.restore_to_service import restore_to

EXPECTED = (ValueError, DrillFailed, RetrievalFailed, ChildFailed, InvalidArgument)
CURVE = Path("bench/results/serving.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line where the answer is no)."""
    flags = parser().parse_args(arguments)
    return run_command("deploy.operators", lambda: flags.run(flags), expected=EXPECTED)


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.operators", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    capacity = commands.add_parser("capacity", help="replicas for arrivals and a deadline, from a measured curve")
    capacity.set_defaults(run=_capacity)
    capacity.add_argument("--arrivals", type=float, required=True, metavar="PER_S", help="pictures asked for a second")
    capacity.add_argument("--deadline", type=float, required=True, metavar="SECONDS")
    capacity.add_argument("--share", type=float, default=0.99, help="that ends in time (default: %(default)s)")
    capacity.add_argument("--curve", type=Path, default=CURVE, metavar="FILE", help="default: %(default)s")
    capacity.add_argument("--kind", choices=("triton", "embedded"), default="triton")
    capacity.add_argument("--slots", type=int, default=8, metavar="N", help="drawn at once (default: %(default)s)")
    capacity.add_argument("--scale", type=float, default=1.0, metavar="X", help="your rate over the measured one")
    qdrant = commands.add_parser("size-qdrant", help="memory, disk and nodes for a number of pairs")
    qdrant.set_defaults(run=_size_qdrant)
    qdrant.add_argument("--pairs", type=float, nargs="+", required=True, metavar="N")
    qdrant.add_argument("--dimensions", type=int, default=512, metavar="D", help="default: %(default)s")
    qdrant.add_argument(
        "--payload-bytes", type=float, default=500.0, metavar="B", help="of a pair (default: %(default)g)"
    )
    qdrant.add_argument("--copies", type=int, default=2, metavar="N", help="replication factor (default: %(default)s)")
    qdrant.add_argument("--node-gb", type=float, default=128.0, metavar="GB", help="memory (default: %(default)g)")
    drills = commands.add_parser("restore-drill", help="save, delete, restore, compare: on a copy of a library")
    drills.set_defaults(run=_restore_drill)
    drills.add_argument("library", type=Path, metavar="FOLDER")
    drills.add_argument("--knowledge-base", required=True, metavar="NAME")
    drills.add_argument("--lookups", type=int, default=50, metavar="N", help="default: %(default)s")
    restores = commands.add_parser("restore-to", help="a snapshot's pairs into a service that runs")
    restores.set_defaults(run=_restore_to)
    restores.add_argument("snapshot", type=Path, metavar="SNAPSHOT", help="its folder: SNAPSHOTS/NAME/GENERATION")
    restores.add_argument("--retrieval", required=True, metavar="ADDRESS", help="host:port or dns:///host:port")
    restores.add_argument("--knowledge-base", required=True, metavar="NAME", help="made if it is not there")
    restores.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds an admin key")
    restores.add_argument(
        "--tls-ca-file", type=Path, metavar="FILE", help="PEM certificates of the service's authority"
    )
    return made


def _capacity(flags: argparse.Namespace) -> None:
    curve = read_curve(flags.curve, flags.kind, slots=flags.slots, scale=flags.scale)
    print("replicas  load  mean s  95 % s  in time")
    for tried in plan(curve, flags.arrivals, flags.deadline, share=flags.share):
        figures = f"{tried.load:4.2f}  {tried.mean_s:6.2f}  {tried.p95_s:6.2f}  {tried.in_time:7.4f}"
        print(f"{tried.replicas:8d}  {figures}")


def _size_qdrant(flags: argparse.Namespace) -> None:
    print("pairs          plan     memory GB a copy  disk GB a copy  nodes")
    for pairs in flags.pairs:
        for kept in PLANS:
            told = size(
                int(pairs),
                kept,
                dimensions=flags.dimensions,
                payload_bytes=flags.payload_bytes,
                copies=flags.copies,
                node_gb=flags.node_gb,
            )
            print(f"{int(pairs):13,d}  {told.plan:7}  {told.memory_gb:16.1f}  {told.disk_gb:14.1f}  {told.nodes:5d}")


def _restore_drill(flags: argparse.Namespace) -> None:
    told = drill(flags.library, flags.knowledge_base, lookups=flags.lookups)
    saved = f"generation {told.generation}, {told.num_pairs} pairs, {told.num_bytes} bytes"
    print(f"{flags.knowledge_base}: {saved}; restored, and {told.lookups} lookups answered as before")


def _restore_to(flags: argparse.Namespace) -> None:
    key = flags.api_key_file.read_text().strip() if flags.api_key_file else ""
    tls = Tls(roots=flags.tls_ca_file.read_bytes()) if flags.tls_ca_file else None
    with KnowledgeBases(flags.retrieval, api_key=key, tls=tls) as target:
        told = restore_to(flags.snapshot, target, flags.knowledge_base)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(told.outcomes.items())) or "no pairs"
    print(f"{flags.knowledge_base}: {counts}; {told.more} more are there that the snapshot has not")


if __name__ == "__main__":
    sys.exit(main())
