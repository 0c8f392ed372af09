"""What is measured of a running system and who is told: the files that follow from others, and the fire drill."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from client.command_line import BadInput, Parser
from common.service.command import run_command
from deploy.local.children import ROOT, ChildFailed
from deploy.local.supervision import Supervision
from deploy.local.up import programs_of
from deploy.monitoring.drill import drill, watching
from deploy.monitoring.manifests import RUNBOOKS, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    return run_command("deploy.monitoring", partial(_run, arguments), expected=(BadInput, ChildFailed))


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="python -m deploy.monitoring", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="rules/objectives.yaml, and the PrometheusRules of deploy/k8s")
    writing.add_argument(
        "--runbooks", default=RUNBOOKS, metavar="URL", help="where alerts link to (default: %(default)s)"
    )
    writing.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write the rules files there, for a Prometheus without its operator (default: what is committed)",
    )
    writing.set_defaults(body=_write)
    drilling = commands.add_parser("drill", help="stop a part of the stack of `make up`, and see that somebody is told")
    drilling.add_argument(
        "--state",
        type=Path,
        default=ROOT / "build" / "stack",
        metavar="FOLDER",
        help="of the stack (default: build/stack)",
    )
    drilling.add_argument("--stop", default="retrieval", metavar="PROCESS", help="default: retrieval")
    drilling.set_defaults(body=_drill)
    flags = parser.parse_args(arguments)
    flags.body(flags)


def _write(flags: argparse.Namespace) -> None:
    parts = urlsplit(flags.runbooks)
    if flags.runbooks != RUNBOOKS and (parts.scheme not in ("http", "https") or not parts.netloc or parts.fragment):
        raise BadInput(f"--runbooks: {flags.runbooks!r} is no http or https URL of a page")
    write(runbooks=flags.runbooks, out=flags.out)


def _drill(flags: argparse.Namespace) -> None:
    supervision = Supervision(flags.state)
    targets = {each.name: f"127.0.0.1:{each.metrics_port}" for each in programs_of(supervision) if each.metrics_port}
    pids = {state.name: state.pid for state in supervision.states()}
    if flags.stop not in targets:
        raise BadInput(f"--stop: {flags.stop!r} is none of {', '.join(targets)}")
    with tempfile.TemporaryDirectory(prefix="reimagen-drill-") as folder, watching(targets, Path(folder)) as watch:
        print(
            f"Prometheus at {watch.prometheus}, Alertmanager at {watch.alertmanager}; stopping {flags.stop}", flush=True
        )
        told = drill(watch, job=flags.stop, pids=[pids[flags.stop]])
        print(f"{told.fired_s:5.1f} s  {told.fired.receiver} is told: {told.fired.annotations['summary']}")
        print(f"{told.resolved_s:5.1f} s  after it went on, {told.fired.receiver} is told that it is over")


if __name__ == "__main__":
    sys.exit(main())
