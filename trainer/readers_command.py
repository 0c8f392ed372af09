"""`python -m trainer fit-readers`: the readers of the captions are trained by themselves, and begin a run."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from common.files import write_atomic
from trainer.dataset import open_prepared
from trainer.fit import Trainer, open_run
from trainer.fit_command import describe_run, open_source
from trainer.look import look, read_log
from trainer.presets import PRESETS, preset
from trainer.publish import check_replaced, publish
from trainer.readers import Readers, ReadersPlan
from trainer.run_folder import held

LINES = 25  # of the log, over the whole training
STATES = "state-*.safetensors"


def add_readers_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `fit-readers`, beside `--data`."""
    command.add_argument("--preset", choices=sorted(PRESETS), default="demo-64", help="default: %(default)s")
    command.add_argument("--run", type=Path, help="folder of the run that begins (default: runs/<preset>)")
    command.add_argument(
        "--start-from", type=Path, help="all other weights: a weights folder, a run's or a state's file"
    )
    command.add_argument("--steps", type=int, default=ReadersPlan.steps, help="default: %(default)s")
    command.add_argument(
        "--captions", type=int, default=ReadersPlan.captions, help="read in a step (default: %(default)s)"
    )
    command.add_argument("--threads", type=int, help="CPU threads (default: the machine's)")
    command.add_argument(
        "--weights", type=Path, help="publish there; needs --start-from, or there is nothing else to it"
    )
    command.add_argument("--replace", action="store_true", help="publish also over weights that saw more examples")


def fit_readers(flags: argparse.Namespace) -> None:
    """Train the readers, save a state from which `fit` goes on, publish if asked to.

    Raises:
        ValueError: a flag cannot be; the message names it.
    """
    row, plan = preset(flags.preset), _plan(flags)
    if any(flags.run.glob(STATES)):
        raise ValueError(
            f"--run: {flags.run} holds states already; begin another run from them: --start-from {flags.run}"
        )
    if flags.weights and flags.start_from is None:
        raise ValueError("--weights: readers alone draw nothing: give the other weights, --start-from")
    torch.set_num_threads(flags.threads or os.cpu_count() or 1)
    prepared = open_prepared(flags.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, _ = open_run(row, open_source(row, prepared), flags.run, device, flags.start_from)
    if flags.weights and not flags.replace:
        check_replaced(flags.weights, row.stage, trainer.state.examples, row.unet)
    readers = Readers(trainer.state.unet, row, prepared, plan)
    with held(flags.run):
        trainer.enter_folder()
        describe_run(trainer, prepared)
        _fit(trainer, readers, plan)
        _take_over(trainer)
        trainer.save()
        plot_readers(flags.run)
        if trainer.state.step:
            trainer.evaluate(look)
    if flags.weights:
        print(publish(trainer, flags.weights, prepared.fingerprint, replace=flags.replace))
    else:
        print(flags.run)


def _plan(flags: argparse.Namespace) -> ReadersPlan:
    for name in ("steps", "captions", "threads"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value} is not 1 or more")
    return ReadersPlan(steps=flags.steps, captions=flags.captions)


def _fit(trainer: Trainer, readers: Readers, plan: ReadersPlan) -> None:
    """Train; a line of the log has the means since the line before, and how well held-out captions are read then."""
    every = max(1, plan.steps // LINES)

    def tell(step: int, figures: dict[str, float]) -> None:
        figures = figures | readers.held_out()
        trainer.log({"kind": "readers", "readers_step": step} | figures)
        if not sys.stderr.isatty():
            told = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
            logging.info("readers, step %d of %d: %s", step, plan.steps, told)

    tell(0, {})
    window: list[dict[str, float]] = []
    quiet = None if sys.stderr.isatty() else True
    with tqdm(desc="readers", total=plan.steps, unit="step", mininterval=1.0, disable=quiet) as bar:

        def show(step: int, figures: dict[str, float]) -> None:
            bar.update(1)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            window.append(figures)
            if step % every == 0 or step == plan.steps:
                tell(step, {name: fmean(each[name] for each in window) for name in figures})
                window.clear()

        readers.fit(show)


def _take_over(trainer: Trainer) -> None:
    """What was learnt is what is published: averages of a run that begins are its weights."""
    for average in trainer.state.averages.values():
        for name, tensor in Readers.named_tensors(trainer.state.unet).items():
            average[name].copy_(tensor)


def plot_readers(folder: Path) -> None:
    """Write `readers.png`: the loss, and how well held-out captions are read."""
    lines = [line for line in read_log(folder) if line["kind"] == "readers"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    parts = (
        ("loss", "loss of training captions", "linear"),
        ("color_error", "held-out color, off by levels of 255", "log"),
        ("neighbor_named", "held-out, nearest neighbor named", "linear"),
    )
    for axes, (name, title, scale) in zip(figure.subplots(1, len(parts)), parts, strict=True):
        points = [(line["readers_step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=0.8)
        axes.set(title=title, xlabel="step", yscale=scale)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    write_atomic(folder / "readers.png", stream.getvalue())
