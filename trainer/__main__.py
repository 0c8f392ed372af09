"""`python -m trainer corpus | prepare | knn | fit-readers | fit | publish | fit-clip | serve`: from a corpus to weights."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from client.knowledge_base import RetrievalFailed
from common.checkpoint import CheckpointError
from common.corpus import CorpusError
from common.service.command import run_command
from common.text import TextEncoder, packaged_encoder
from trainer.clip_command import add_clip_flags, fit_clip
from trainer.crops import prepare_crops
from trainer.dataset import Prepared, Progress, open_prepared, prepare
from trainer.dry_run import dry_run
from trainer.fit import Trainer, open_run
from trainer.fit_command import add_fit_flags, at_side, cooled_down, fit, open_source
from trainer.knn_command import add_corpus_flags, add_knn_flags, ask_for_neighbors, make_corpus
from trainer.knn_lookup import LookupFailed
from trainer.presets import PRESETS, Preset, preset
from trainer.publish import publish
from trainer.readers_command import add_readers_flags, fit_readers
from trainer.snapshots import average_of_length
from trainer.state import uses_bfloat16

DATA = Path("runs/prepared")
EXPECTED = (CorpusError, CheckpointError, ValueError, FileNotFoundError, LookupFailed, RetrievalFailed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["serve"]:  # which trains nothing itself: a process without torch takes this one's place
        os.execv(sys.executable, [sys.executable, "-m", "trainer.service", *arguments[1:]])
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="start, follow and export runs for callers (TrainerService)", add_help=False)

    def command(
        name: str, text: str, body: Callable[[argparse.Namespace], None], *, prepared: bool = True
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        if prepared:
            made.add_argument(
                "--data", type=Path, default=DATA, help="folder of the prepared arrays (default: %(default)s)"
            )
        made.set_defaults(body=body)
        return made

    preparing = command("prepare", "render pictures and encode captions, once", _prepare)
    preparing.add_argument("--corpus", type=Path, required=True)
    preparing.add_argument("--preset", choices=sorted(PRESETS), help="encode captions as this preset reads them")
    preparing.add_argument(
        "--text-encoder", default="", help="folder or hub name to load it from (default: the preset's)"
    )
    add_corpus_flags(
        command("corpus", "write a knowledge base as a corpus that can be prepared and trained on", _corpus)
    )
    add_knn_flags(command("knn", "ask the retrieval service for every pair's neighbors, once", _knn))
    add_readers_flags(command("fit-readers", "train the readers of captions by themselves; begins a run", fit_readers))
    fitting = command("fit", "train a preset, resuming what its run folder holds", _fit)
    publishing = command("publish", "write a run's averaged weights for serving", _publish)
    for made in (fitting, publishing):
        made.add_argument("--preset", choices=sorted(PRESETS), required=True)
        made.add_argument("--run", type=Path, help="folder of the run (default: runs/<preset>)")
        made.add_argument("--weights", type=Path, help="weights folder; fit publishes there at its end if given")
        made.add_argument(
            "--replace", action="store_true", help="publish also over weights that saw more examples than this run"
        )
    add_fit_flags(fitting)
    publishing.add_argument("--average-length", type=float, help="relative length of a post-hoc run's average")
    add_clip_flags(command("fit-clip", "train the dual encoder of the retrieval service", _fit_clip))
    flags = parser.parse_args(arguments)
    if "run" in flags and flags.run is None:
        flags.run = Path("runs") / flags.preset
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    return run_command("trainer", lambda: flags.body(flags), expected=EXPECTED)


def _progress() -> Progress:
    bars: dict[str, tqdm] = {}

    def report(task: str, done: int, total: int) -> None:
        if task not in bars:
            bars[task] = tqdm(desc=task, total=total, mininterval=1.0)
        bars[task].update(done - bars[task].n)
        if done == total:
            bars[task].close()

    return report


def _prepare(flags: argparse.Namespace) -> None:
    name = preset(flags.preset).text_encoder if flags.preset else flags.text_encoder
    where = flags.text_encoder or name or packaged_encoder()

    def encoder() -> TextEncoder:
        try:
            return TextEncoder(where)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the machine, as a full disk is
                raise
            raise ValueError(f"--text-encoder: {str(where)!r} cannot be loaded: {error}") from error

    prepare(flags.corpus, flags.data, encoder, _progress(), text_encoder=name)
    prepare_crops(flags.corpus, flags.data, _progress())


def _corpus(flags: argparse.Namespace) -> None:
    print(make_corpus(flags, _progress()))


def _knn(flags: argparse.Namespace) -> None:
    print(ask_for_neighbors(flags, _progress()))


def _fit(flags: argparse.Namespace) -> None:
    row = preset(flags.preset)
    if flags.side is not None:
        row = at_side(row, flags.side)
    if flags.cooldown is not None:
        row = cooled_down(row, flags.examples, flags.cooldown)
    if flags.accumulation is not None:
        row = replace(row, accumulation=flags.accumulation)
    if flags.dry_run:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(dry_run(row, ranks=flags.ranks, bfloat16=uses_bfloat16(row, device)))
        return
    if flags.ranks != 1:
        raise ValueError("--ranks: goes with --dry-run; torchrun starts ranks")
    fit(flags, row, os.environ)


def _fit_clip(flags: argparse.Namespace) -> None:
    fit_clip(flags, _progress())


def _publish(flags: argparse.Namespace) -> None:
    if not flags.weights:
        raise ValueError("--weights: is needed to publish")
    if not any(flags.run.glob("state-*.safetensors")):  # opening it would make the folder
        raise ValueError(f"--run: {flags.run} holds no state")
    print("[1/2] reading the run's newest state", flush=True)  # the service tells these lines as progress
    trainer, prepared = _open(flags, preset(flags.preset))
    if not trainer.state.step:
        raise ValueError(f"--run: {flags.run} holds no state after a step")
    print("[2/2] writing the averaged weights", flush=True)
    step, average = None, None
    if flags.average_length is not None:
        step, average = average_of_length(flags.run, flags.average_length)
    fingerprint = prepared.fingerprint
    print(publish(trainer, flags.weights, fingerprint, average=average, step=step, replace=flags.replace))


def _open(flags: argparse.Namespace, row: Preset) -> tuple[Trainer, Prepared]:
    prepared = open_prepared(flags.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, skipped = open_run(row, open_source(row, prepared), flags.run, device)
    for line in skipped:
        logging.warning("passed over: %s", line)
    return trainer, prepared


if __name__ == "__main__":
    sys.exit(main())
