"""`python -m evaluation ablation NAME ...`: what the command is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from client import NO_RETRY, Client
from evaluation.ablations.experiment import Places, draw_ablation, measure_ablation
from evaluation.ablations.rows import ABLATIONS, ablation
from evaluation.entitydraw.command import CORPUS, galleries_of, load_suite, styles_of_corpus
from evaluation.entitydraw.progress import make_progress

OUT = Path("evaluation/results/ablations")
RUN = Path("runs/ablations")


def add_commands(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    names = [row.name for row in ABLATIONS]
    running = commands.add_parser("ablation", help="draw, score and plot ablations on the demonstration suite")
    running.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of {', '.join(names)}")
    running.add_argument(
        "--generator",
        metavar="HOST:PORT",
        help="draws what lacks; without one, what was drawn is scored and plotted anew",
    )
    running.add_argument("--only-draw", action="store_true", help="score and plot later")
    running.add_argument("--corpus", type=Path, default=CORPUS, help="default: %(default)s")
    running.add_argument("--run", type=Path, default=RUN, help="where pictures are kept (default: %(default)s)")
    running.add_argument("--out", type=Path, default=OUT, help="data, plots and sheets (default: %(default)s)")
    running.add_argument("--calls", type=int, default=2, metavar="N", help="at once (default: %(default)s)")
    running.set_defaults(body=_ablation)


def _ablation(flags: argparse.Namespace) -> None:
    rows = ABLATIONS if flags.names == ["all"] else tuple(ablation(name) for name in flags.names)
    suite = load_suite("demo", flags.corpus)
    galleries = galleries_of(suite, flags.corpus)
    places, progress = Places(run=flags.run, out=flags.out), make_progress()
    styles_of = styles_of_corpus(suite, flags.corpus, progress)
    if flags.generator:
        with Client(flags.generator, retry=NO_RETRY) as client:
            for row in rows:
                draw_ablation(row, suite, client, places, flags.calls, progress)
    for row in () if flags.only_draw else rows:
        measure_ablation(row, suite, galleries, places, progress, styles_of)
        print(flags.out / f"{row.name}.json")
