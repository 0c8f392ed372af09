"""The product on one machine, without a cluster: draw a picture, or build the demonstration knowledge base."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from client.command_line import BadInput, Parser
from client.display import make_display
from client.generation_messages import GenerationFailed
from client.message_fields import FieldError
from client.request_flags import add_request_flags, request_of
from common.corpus import CorpusError
from common.service.command import run_command
from common.service.config import ConfigError
from common.service.errors import ServiceError
from common.service.server import die_with_parent
from deploy.local.children import ROOT, ChildFailed
from deploy.local.generate import Places, generate
from deploy.local.knowledge_base import ensure_knowledge_base
from deploy.local.stack import GeneratorFlags, running_retrieval
from deploy.local.up_command import add_up_commands
from retrieval_svc.folder_lock import FolderInUse
from retrieval_svc.library import LibraryError

EXPECTED = (
    BadInput,
    ChildFailed,
    ConfigError,
    CorpusError,
    FieldError,
    FolderInUse,
    GenerationFailed,
    LibraryError,
    ServiceError,
)
ADDRESS = "{address}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    return run_command("deploy.local", partial(_run, arguments), expected=EXPECTED)


def _run(arguments: Sequence[str] | None) -> None:
    flags = _parser().parse_args(arguments)
    flags.body(flags)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = Parser(add_help=False)
    shared.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "demo",
        metavar="FOLDER",
        help="the demonstration knowledge base (default: build/demo)",
    )
    drawing = commands.add_parser("generate", parents=[shared], help="draw a picture")
    _add_generate_flags(drawing)
    drawing.set_defaults(body=_generate)
    building = commands.add_parser("knowledge-base", parents=[shared], help="build the demonstration knowledge base")
    building.set_defaults(body=_build)
    serving = commands.add_parser(
        "with-retrieval", parents=[shared], help=f"run a command beside retrieval, its address in place of {ADDRESS}"
    )
    serving.add_argument("argv", nargs="+", metavar="COMMAND", help=f"after --, e.g. -- client {ADDRESS}")
    serving.set_defaults(body=_with_retrieval)
    add_up_commands(commands, shared)
    return parser


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    parser.add_argument(
        "--weights",
        type=Path,
        default=ROOT / "weights",
        metavar="FOLDER",
        help="the stages' weights (default: weights)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: one for each core")
    add_request_flags(parser)


def _generate(flags: argparse.Namespace) -> None:
    display = make_display()
    request = request_of(flags)
    places = Places(out=flags.out, work=flags.work, logs=flags.work / "logs")
    generator = GeneratorFlags(weights=flags.weights, device=flags.device, threads=flags.threads)
    with display.live():
        written = generate(request, places, generator, display, timeout_s=flags.timeout_s)
    for path in written:
        print(path)


def _build(flags: argparse.Namespace) -> None:
    display = make_display()
    with display.live():
        library = ensure_knowledge_base(flags.work, display)
    print(library)


def _with_retrieval(flags: argparse.Namespace) -> None:
    display = make_display()
    with display.live():
        library = ensure_knowledge_base(flags.work, display)
    with running_retrieval(library, flags.work / "logs") as address:
        command = [word.replace(ADDRESS, address) for word in flags.argv]
        status = subprocess.run(command, preexec_fn=partial(die_with_parent, os.getpid())).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    sys.exit(main())
