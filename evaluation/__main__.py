"""`python -m evaluation demo`: measure weights on the demonstration suite."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import CheckpointError
from common.corpus import CorpusError
from common.service.command import run_command
from evaluation.cascade import Cascade
from evaluation.demo import Size, evaluate_demo, write_results
from evaluation.suite import demo_suite
from retrieval_svc.index_folder import IndexFolderError
from retrieval_svc.knowledge_base import KnowledgeBase


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="entity faithfulness, backgrounds, enlargement, color drift")
    for name in ("corpus", "index", "weights", "out"):
        demo.add_argument(f"--{name}", type=Path, required=True)
    demo.add_argument("--prompts", type=int, default=Size.prompts, help="default: %(default)s")
    demo.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args(arguments)
    return run_command(
        "evaluation", lambda: _demo(flags), expected=(CheckpointError, CorpusError, IndexFolderError, ValueError)
    )


def _demo(flags: argparse.Namespace) -> None:
    torch.set_num_threads(flags.threads)
    cascade = Cascade.load(flags.weights)
    suite = demo_suite(flags.corpus, flags.prompts)
    bars: dict[str, tqdm] = {}

    def progress(task: str, done: int, total: int) -> None:
        bar = bars.setdefault(task, tqdm(desc=task, total=total))
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    figures, sheet = evaluate_demo(
        suite, KnowledgeBase.open(flags.index), cascade, Size(prompts=flags.prompts), progress
    )
    write_results(flags.out, figures, sheet)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    sys.exit(main())
