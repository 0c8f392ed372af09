"""`python -m evaluation report`: what the command is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.files import write_atomic
from evaluation.entitydraw.command import CORPUS, load_suite
from evaluation.entitydraw.results import RunFolder
from evaluation.report.page import Section, render
from evaluation.report.sections import ablation_sections, flat_section, run_section

RESULTS = Path("evaluation/results")
TITLE = "Re-Imagen, measured"
ABOUT = (
    "Does looking entities up make their pictures faithful? The demonstration suite's entities are held out: the weights have"
    " seen no picture of them. The pair that a prompt asks for is never among the neighbors, unless a row says so. Nothing is"
    " chosen: where there is no room for all prompts, the first by hash are shown. Scores are automatic; no person has rated."
)


def add_commands(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    reporting = commands.add_parser("report", help="one HTML file of everything that was measured")
    reporting.add_argument(
        "--run", type=Path, action="append", default=[], metavar="RUN", help="of entitydraw; repeatable"
    )
    reporting.add_argument("--suite", default="demo", help="of the runs (default: %(default)s)")
    reporting.add_argument("--references", type=Path, metavar="FOLDER", help="of the runs, where they had one")
    reporting.add_argument("--corpus", type=Path, default=CORPUS, help="default: %(default)s")
    reporting.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    reporting.add_argument("--out", type=Path, default=Path("out/report.html"), help="default: %(default)s")
    reporting.set_defaults(body=_report)


def _report(flags: argparse.Namespace) -> None:
    sections: list[Section] = []
    if flags.run:
        suite = load_suite(flags.suite, flags.corpus, flags.references)
        sections += [run_section(RunFolder(path), suite) for path in flags.run]
    sections += ablation_sections(flags.results / "ablations")
    if (flags.results / "demo.json").is_file():
        sections.append(_cascade(flags.results))
    if (flags.results / "clip.json").is_file():
        sections.append(_clip(flags.results))
    write_atomic(flags.out, render(TITLE, ABOUT, sections))
    print(flags.out)


def _cascade(results: Path) -> Section:
    return flat_section(
        "The cascade",
        "Entities, backgrounds and corners in process, what the two enlarging stages gain over bicubic, and how far colors"
        " drift; weights/README.md says what each figure is.",
        results / "demo.json",
        [results / "demo.png", results / "training-64.png"],
        "python -m evaluation demo --corpus build/demo/corpus --library build/demo/knowledge-bases --weights weights"
        " --out evaluation/results",
    )


def _clip(results: Path) -> Section:
    return flat_section(
        "The dual encoder",
        "Do texts and pictures of held-out entities find each other among a hundred? weights/README.md says what each"
        " figure is.",
        results / "clip.json",
        [results / "clip.png"],
        "python -m evaluation clip --corpus build/demo/corpus --out evaluation/results",
    )
