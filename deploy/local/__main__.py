"""The product on one machine, without a cluster: draw a picture, or build the demonstration knowledge base."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from client.generator import GenerationFailed, GenerationRequest, StageOverrides
from common.corpus import CorpusError
from common.diffusion.guidance import STRATEGIES
from common.diffusion.sampler import SAMPLERS
from common.diffusion.threshold import THRESHOLDINGS
from common.service.command import run_command
from common.service.config import ConfigError
from common.service.errors import ServiceError
from common.service.server import die_with_parent
from common.stages import STAGES
from deploy.local.children import ROOT, ChildFailed
from deploy.local.display import make_display
from deploy.local.generate import BadRequest, Places, generate
from deploy.local.knowledge_base import ensure_knowledge_base
from deploy.local.stack import GeneratorFlags, running_retrieval
from retrieval_svc.folder_lock import FolderInUse
from retrieval_svc.library import LibraryError

EXPECTED = (
    BadRequest,
    ChildFailed,
    ConfigError,
    CorpusError,
    FolderInUse,
    GenerationFailed,
    LibraryError,
    ServiceError,
)
ADDRESS = "{address}"
SIZES = tuple(spec.size for spec in STAGES)
_OVERRIDES: dict[str, dict[str, Any]] = {
    "steps": {"type": int, "metavar": "N", "help": "denoising steps"},
    "sampler": {"choices": SAMPLERS, "help": "sampler"},
    "guidance_strategy": {"choices": STRATEGIES, "help": "how text and neighbors are weighed"},
    "text_weight": {"type": float, "metavar": "W", "help": "guidance weight of text"},
    "neighbor_weight": {"type": float, "metavar": "W", "help": "guidance weight of neighbors"},
    "eta": {"type": float, "metavar": "SHARE", "help": "share of text steps"},
    "thresholding": {"choices": THRESHOLDINGS, "help": "how estimates are kept in range"},
    "augmentation": {"type": float, "metavar": "TIME", "help": "time to which the input is noised"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    flags = _parser().parse_args(arguments)
    return run_command("deploy.local", partial(flags.body, flags), expected=EXPECTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
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
    return parser


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, help='e.g. "a guide dog, noto style, on a blue background"')
    parser.add_argument("--seed", type=int, help="0 to 2^63 - 1 (default: drawn)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--k", type=int, metavar="N", help="neighbors (default: 2)")
    parser.add_argument("--exclude-exact", action="store_true", help="leave out the very pair that the prompt asks for")
    parser.add_argument(
        "--exclude-pair", action="append", default=[], metavar="ID", help="leave out this pair; may be repeated"
    )
    parser.add_argument("--without-neighbors", action="store_true", help="draw from the text alone")
    parser.add_argument("--stop-at", type=int, choices=SIZES, default=SIZES[-1], help="the last stage (default: 1024)")
    parser.add_argument(
        "--weights",
        type=Path,
        default=ROOT / "weights",
        metavar="FOLDER",
        help="the stages' weights (default: weights)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads; 0: one for each core")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="deadline (default: 600)")
    for size in SIZES:
        group = parser.add_argument_group(f"stage {size}")
        for name, options in _OVERRIDES.items():
            group.add_argument(f"--{name.replace('_', '-')}-{size}", dest=f"{name}_{size}", **options)


def _generate(flags: argparse.Namespace) -> None:
    display = make_display()
    request = GenerationRequest(
        prompt=flags.prompt,
        k=flags.k,
        excluded_pair_ids=tuple(flags.exclude_pair),
        exclude_exact=flags.exclude_exact,
        without_neighbors=flags.without_neighbors,
        seed=flags.seed,
        stop_at=flags.stop_at,
        stages=_overrides(flags),
    )
    places = Places(out=flags.out, work=flags.work, logs=flags.work / "logs")
    generator = GeneratorFlags(weights=flags.weights, device=flags.device, threads=flags.threads)
    with display.live():
        written = generate(request, places, generator, display, timeout_s=flags.timeout_s)
    for path in written:
        print(path)


def _overrides(flags: argparse.Namespace) -> tuple[StageOverrides, ...]:
    given = {
        size: {name: value for name in _OVERRIDES if (value := getattr(flags, f"{name}_{size}")) is not None}
        for size in SIZES
    }
    return tuple(StageOverrides(stage=size, **values) for size, values in given.items() if values)


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
