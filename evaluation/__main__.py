"""`python -m evaluation`: measure weights, systems and people's votes; `--help` lists the commands."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from client import ServiceFailed
from common.checkpoint import CheckpointError
from common.corpus import CorpusError, iter_pairs
from common.service.command import run_command
from common.service.errors import ServiceError
from deploy.local.children import ChildFailed
from deploy.local.knowledge_base import NAME
from deploy.local.working_copy import working_copy
from evaluation.ablations import command as ablation_command
from evaluation.alike import ENTITIES, in_order, measure_likeness
from evaluation.cascade import Cascade
from evaluation.clip_recall import evaluate_clip, write_clip_results
from evaluation.demo import Size, evaluate_demo, write_results
from evaluation.entitydraw import command as entitydraw_command
from evaluation.photographs.command import add_commands as add_photographs
from evaluation.rating.command import add_rating
from evaluation.report import command as report_command
from evaluation.suite import demo_suite
from retrieval_svc.clip import ClipEmbedder, packaged_clip
from retrieval_svc.folder_lock import FolderInUse
from retrieval_svc.library import Library

EXPECTED = (CheckpointError, ChildFailed, CorpusError, FolderInUse, ServiceError, ServiceFailed, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="entity faithfulness, backgrounds, enlargement, color drift")
    for name in ("corpus", "library", "weights", "out"):
        demo.add_argument(f"--{name}", type=Path, required=True)
    demo.add_argument("--knowledge-base", default=NAME, help="default: %(default)s")
    demo.add_argument("--prompts", type=int, default=Size.prompts, help="default: %(default)s")
    demo.add_argument("--threads", type=int, default=torch.get_num_threads())
    demo.set_defaults(body=_demo)
    clip = commands.add_parser("clip", help="recall of a dual encoder: texts and pictures find each other")
    for name in ("corpus", "out"):
        clip.add_argument(f"--{name}", type=Path, required=True)
    clip.add_argument("--model", default=packaged_clip(), help="folder or hub name; default: the packaged one")
    clip.add_argument("--threads", type=int, default=torch.get_num_threads())
    clip.set_defaults(body=_clip)
    alike = commands.add_parser("alike", help="which styles stand in for which, on entities that are not held out")
    alike.add_argument("--corpus", type=Path, required=True)
    alike.add_argument("--facet", default="style", help="default: %(default)s")
    alike.add_argument("--entities", type=int, default=ENTITIES, help="draw at most so many; default: %(default)s")
    alike.set_defaults(body=_alike)
    entitydraw_command.add_commands(commands)
    ablation_command.add_commands(commands)
    report_command.add_commands(commands)
    add_rating(commands)
    add_photographs(commands)
    flags = parser.parse_args(arguments)
    return run_command("evaluation", lambda: flags.body(flags), expected=EXPECTED)


def _demo(flags: argparse.Namespace) -> None:
    torch.set_num_threads(flags.threads)
    cascade = Cascade.load(flags.weights)
    suite = demo_suite(flags.corpus, flags.prompts)
    with working_copy(flags.library) as copy, closing(Library.open(copy)) as library:
        knowledge_base = library.get(flags.knowledge_base)
        figures, sheet = evaluate_demo(suite, knowledge_base, cascade, Size(prompts=flags.prompts), _progress())
    write_results(flags.out, figures, sheet)
    print(json.dumps(figures, indent=2))


def _alike(flags: argparse.Namespace) -> None:
    likeness = measure_likeness(iter_pairs(flags.corpus), flags.facet, flags.entities, _progress())
    print(json.dumps({"likeness": likeness, "alike": in_order(likeness)}, indent=2))


def _clip(flags: argparse.Namespace) -> None:
    torch.set_num_threads(flags.threads)
    figures, sheet = evaluate_clip(ClipEmbedder(flags.model, device="auto"), flags.corpus, _progress())
    write_clip_results(flags.out, figures, sheet)
    print(json.dumps(figures, indent=2))


def _progress() -> Callable[[str, int, int], None]:
    bars: dict[str, tqdm] = {}

    def report(task: str, done: int, total: int) -> None:
        if task not in bars:
            bars[task] = tqdm(desc=task, total=total)
        bar = bars[task]
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


if __name__ == "__main__":
    sys.exit(main())
