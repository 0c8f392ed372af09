"""`python -m evaluation entitydraw | demo-suite`: what these commands are told."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from client import NO_RETRY, Client, GenerationFailed
from common.corpus import iter_pairs, read_manifest
from deploy.local.stack import GeneratorFlags, running_stack
from evaluation.entitydraw.demo_suite import make_demo_suite, write_demo_suite
from evaluation.entitydraw.figures import run_figures, write_figures
from evaluation.entitydraw.progress import Progress, make_progress
from evaluation.entitydraw.results import RunFolder
from evaluation.entitydraw.runner import PICTURES, RunSettings, run_suite
from evaluation.entitydraw.scoring import Galleries, Styles, score_run
from evaluation.entitydraw.suite_file import Suite, SuiteError, read_suite
from evaluation.entitydraw.systems import BUILT_IN, read_systems
from evaluation.scores.style import (
    StyleClassifier,
    fit_style_classifier,
    read_style_classifier,
    write_style_classifier,
)
from evaluation.scores.style_features import StyleFeatures
from evaluation.suite import by_style
from retrieval_svc.clip import packaged_clip

SUITES = Path(__file__).parents[1] / "suites"
SHIPPED = {"demo": "demo.json", "entitydrawbench": "entitydrawbench.yaml"}
CORPUS = Path("build/demo/corpus")
LIBRARY = Path("build/demo/knowledge-bases")


def add_commands(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    drawing = commands.add_parser("entitydraw", help="draw a suite with a running generator, and score it")
    drawing.add_argument("--suite", required=True, help=f"{', '.join(SHIPPED)}, or a .json or .yaml file")
    drawing.add_argument(
        "--generator", metavar="HOST:PORT", help="or unix:PATH; without one, the services are started for the command"
    )
    drawing.add_argument("--api-key-file", type=Path, help="holds the key that the generator asks for")
    drawing.add_argument("--out", type=Path, required=True, metavar="RUN", help="a run that is there goes on")
    drawing.add_argument(
        "--system",
        action="append",
        metavar="SYSTEM",
        help=f"{', '.join(BUILT_IN)}, or a .json or .yaml file of rows; may be repeated (default: retrieved and none)",
    )
    drawing.add_argument("--weights", type=Path, default=Path("weights"), help="of services that are started")
    drawing.add_argument("--library", type=Path, default=LIBRARY, help="of the same (default: %(default)s)")
    drawing.add_argument("--corpus", type=Path, default=CORPUS, help="of the suite's pairs (default: %(default)s)")
    drawing.add_argument("--references", type=Path, metavar="FOLDER", help="CATEGORY/ENTITY/*.jpg: your own pictures")
    drawing.add_argument("--prompts", type=int, default=0, metavar="N", help="the first by hash; 0: all")
    drawing.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="a prompt (default: %(default)s)")
    drawing.add_argument("--calls", type=int, default=2, metavar="N", help="at once (default: %(default)s)")
    drawing.add_argument("--only-draw", action="store_true", help="score when the command is given again without it")
    drawing.set_defaults(body=_entitydraw)
    making = commands.add_parser("demo-suite", help="make evaluation/suites/demo.json from the demonstration corpus")
    making.add_argument("--corpus", type=Path, default=CORPUS, help="default: %(default)s")
    making.add_argument("--categories", type=Path, default=SUITES / "demo-categories.yaml")
    making.add_argument("--out", type=Path, default=SUITES / SHIPPED["demo"])
    making.set_defaults(body=_demo_suite)


def load_suite(name: str, corpus: Path, references: Path | None = None) -> Suite:
    """A shipped suite by its name, or a file.

    Raises:
        SuiteError: it is none, or is wrong.
    """
    path = SUITES / SHIPPED[name] if name in SHIPPED else Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise SuiteError(f"suite: {name!r} is none of {', '.join(SHIPPED)}, and no .json or .yaml file")
    return read_suite(path, corpus if corpus.is_dir() else None, references)


def galleries_of(suite: Suite, corpus: Path) -> Galleries:
    """What the suite's pictures are compared with."""
    has_targets = any(prompt.target for prompt in suite.prompts)
    return Galleries(suite, by_style([pair for pair in iter_pairs(corpus) if pair.held_out]) if has_targets else {})


def styles_of_corpus(suite: Suite, corpus: Path, progress: Progress) -> Styles | None:
    """Tells the styles of the corpus apart; None where the suite asks for none. Fitted at first use, once, and kept beside the
    corpus."""
    if not any(prompt.target and "style" in prompt.target.facets for prompt in suite.prompts):
        return None

    @cache
    def fitted() -> tuple[StyleFeatures, StyleClassifier]:
        encoder = StyleFeatures(Path(packaged_clip()))
        path = corpus.parent / f"style-{read_manifest(corpus).fingerprint[:12]}-{encoder.name}.safetensors"
        if not path.exists():
            write_style_classifier(path, fit_style_classifier(corpus, encoder, encoder.name, progress))
        return encoder, read_style_classifier(path)

    def styles_of(pictures: Sequence[np.ndarray]) -> list[str]:
        encoder, classifier = fitted()
        return classifier.styles_of(encoder(pictures))

    return styles_of


def measure(
    folder: RunFolder, suite: Suite, galleries: Galleries, progress: Progress, styles_of: Styles | None = None
) -> dict[str, Any]:
    """Score what is drawn, write `scores.jsonl` and `figures.json`, and give the figures."""
    scores = score_run(folder, suite, galleries, progress, styles_of)
    figures = run_figures(folder.rows(), scores, order=list(folder.read_run()["systems"]))
    write_figures(folder, figures)
    return figures


def _entitydraw(flags: argparse.Namespace) -> None:
    suite = load_suite(flags.suite, flags.corpus, flags.references)
    systems = read_systems(flags.system or ["retrieved", "none"])
    settings = RunSettings(prompts=flags.prompts, pictures=flags.pictures, calls=flags.calls, command=_command())
    folder, progress = RunFolder(flags.out), make_progress()
    key = flags.api_key_file.read_text().strip() if flags.api_key_file else ""
    with _generator(flags) as address, Client(address, api_key=key, retry=NO_RETRY) as client:
        _check_answers(client, address)
        run_suite(suite, systems, client, folder, settings, progress)
    if flags.only_draw:
        return
    styles_of = styles_of_corpus(suite, flags.corpus, progress)
    figures = measure(folder, suite, galleries_of(suite, flags.corpus), progress, styles_of)
    print(json.dumps({name: _short(found["all"]) for name, found in figures["systems"].items()}, indent=2))


def _check_answers(client: Client, address: str) -> None:
    """A wrong address is said at once, not when the runner's patience ends."""
    try:
        client.models()
    except GenerationFailed as error:
        raise GenerationFailed(error.code, f"--generator: {address}: {error.description}") from error


@contextmanager
def _generator(flags: argparse.Namespace) -> Iterator[str]:
    """The address of the generator that is named, or of one that runs as long as the block."""
    if flags.generator:
        yield flags.generator
        return
    weights = GeneratorFlags(weights=flags.weights, device="cpu", threads=0)
    with running_stack(flags.library, weights, flags.library.parent / "logs") as stack:
        yield stack.address


def _short(figures: dict[str, Any]) -> dict[str, str]:
    """One prompt alone has no interval."""
    interval = {name: "" if f["low"] is None else f" [{f['low']}, {f['high']}]" for name, f in figures.items()}
    return {name: f"{f['estimate']:.3f}{interval[name]}" for name, f in figures.items()}


def _command() -> str:
    return "python -m evaluation " + " ".join(sys.argv[1:])


def _demo_suite(flags: argparse.Namespace) -> None:
    write_demo_suite(flags.out, make_demo_suite(flags.corpus, flags.categories))
    print(flags.out)
