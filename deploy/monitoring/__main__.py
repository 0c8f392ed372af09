"""`python -m deploy.monitoring write`: make anew what follows from other files, after a change of the rules."""

from __future__ import annotations

import argparse
import sys

from deploy.monitoring.manifests import write


def main() -> int:
    """Run; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring", description=__doc__)
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="rules/objectives.yaml, and the PrometheusRules of deploy/k8s")
    writing.set_defaults(body=lambda _: write())
    flags = parser.parse_args()
    flags.body(flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
