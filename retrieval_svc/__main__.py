"""`python -m retrieval_svc`: `serve` answers lookups and takes changes, `import` takes pictures in, `restore` a snapshot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from common.service.command import run_command
from retrieval_svc import import_command, restore_command, serve_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m retrieval_svc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_command.add_serve_command(commands)
    import_command.add_import_command(commands)
    restore_command.add_restore_command(commands)
    flags = parser.parse_args(arguments)
    expected = (*serve_command.EXPECTED, *import_command.EXPECTED, *restore_command.EXPECTED)
    return run_command("retrieval_svc", partial(flags.body, flags), expected=expected)


if __name__ == "__main__":
    sys.exit(main())
