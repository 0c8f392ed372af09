"""`python -m deploy.monitoring.dashboards write | check | pictures`: the dashboards' files, their check, their pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from client.display import make_display
from client.generation_messages import GenerationFailed
from common.files import write_atomic
from common.service.command import run_command
from deploy.local.children import ROOT, ChildFailed
from deploy.monitoring.dashboards.boards import BOARDS, FOLDER, json_path
from deploy.monitoring.dashboards.grafana import DEFAULT_RUNBOOKS, to_json
from deploy.monitoring.dashboards.live.check import Finding, check
from deploy.monitoring.dashboards.live.prometheus import Prometheus, QueryFailed
from deploy.monitoring.dashboards.photographer import Demonstration, check_demonstration, draw_demonstration

EXPECTED = (ChildFailed, GenerationFailed, QueryFailed)
FIRST_PORT = 24100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for what cannot be)."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring.dashboards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write the dashboards' JSON")
    writing.add_argument("--runbooks", default=DEFAULT_RUNBOOKS, metavar="URL", help="where panels' links go")
    writing.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: where they are committed")
    writing.set_defaults(body=_write)
    asking = commands.add_parser("check", help="ask every query of a stack that is started for it")
    asking.add_argument(
        "--prometheus", default="", metavar="URL", help="of this Prometheus instead, over a stack in use"
    )
    asking.add_argument("--rate-s", type=float, default=120.0, help="what $__rate_interval is there (default: 120)")
    asking.set_defaults(body=_check)
    drawing = commands.add_parser("pictures", help="draw each dashboard from a stack that is started for it")
    drawing.add_argument("--seconds", type=float, default=300.0, help="of mixed load, failures included (default: 300)")
    drawing.set_defaults(body=_pictures)
    for each in (asking, drawing):
        each.add_argument("--weights", type=Path, default=ROOT / "weights", metavar="FOLDER", help="default: weights")
        each.add_argument(
            "--first-port", type=int, default=FIRST_PORT, metavar="N", help="of 20 (default: %(default)s)"
        )
        each.add_argument(
            "--state",
            type=Path,
            default=ROOT / "build" / "dashboards",
            metavar="FOLDER",
            help="logs, knowledge bases and series of that stack (default: build/dashboards)",
        )
    flags = parser.parse_args(arguments)
    return run_command(parser.prog, lambda: flags.body(flags), expected=EXPECTED)


def _write(flags: argparse.Namespace) -> None:
    flags.out.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        write_atomic(flags.out / json_path(board).name, to_json(board, runbooks=flags.runbooks))


def _check(flags: argparse.Namespace) -> None:
    if flags.prometheus:
        prometheus = Prometheus(flags.prometheus.rstrip("/"))
        findings = list(check(BOARDS, prometheus, rate_s=flags.rate_s, range_s=3600))
    else:
        findings = check_demonstration(_demonstration(flags), make_display())
    print(report(findings))
    if any(finding.fault for finding in findings):
        raise QueryFailed("some queries found nothing, see above")


def _pictures(flags: argparse.Namespace) -> None:
    draw_demonstration(_demonstration(flags), flags.seconds, make_display())


def _demonstration(flags: argparse.Namespace) -> Demonstration:
    return Demonstration(weights=flags.weights, first_port=flags.first_port, state=flags.state)


def report(findings: Sequence[Finding]) -> str:
    """A line for each dashboard, and one for each query that found nothing though it should."""
    lines = []
    for board in BOARDS:
        own = [finding for finding in findings if finding.board is board]
        found = sum(finding.num_series for finding in own)
        lines.append(f"{board.name}: {len(board.panels)} panels, {len(own)} queries, {found} series")
        lines += [f"  {each.panel.title}: {each.fault}: {each.query.expr}" for each in own if each.fault]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
