"""`python -m trainer fit`: one run of a preset, on one process or on the ranks that torchrun starts."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import set_num_threads
from tqdm import tqdm

from common.service.metrics import MetricsEndpoint, process_registry
from common.stages import stage
from trainer.crops import DRAWN_SIZE
from trainer.dataset import RENDER_SIZE, Prepared, open_prepared
from trainer.distributed import PARALLEL, open_ranks
from trainer.fit import Recorder, Schedule, Trainer, open_run
from trainer.loader import Loader
from trainer.look import look
from trainer.presets import Preset, preset
from trainer.publish import check_replaced, differences, publish
from trainer.run_folder import code_digest, describe
from trainer.sources import CropSource, NeighborSource, Source
from trainer.tensorboard_log import TensorBoardLog
from trainer.training_metrics import TrainingMetrics
from trainer.watchdog import open_watchdog

_LEAST = {
    "seconds": 0,
    "examples": 1,
    "cooldown": 1,
    "log_every": 0,
    "evaluate_every": 0,
    "save_every": 0,
    "evaluate_every_steps": 0,
    "save_every_steps": 0,
    "threads": 1,
    "loader_workers": 0,
    "loader_ahead": 1,
}  # of the flags that are numbers; infinity is never


def add_fit_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `fit`, beside those that it shares with `publish`."""
    command.add_argument("--seconds", type=float, help="stop after so long; the run can be resumed")
    command.add_argument("--examples", type=int, help="stop after so many examples in all")
    command.add_argument(
        "--cooldown", type=int, help="let the learning rate fall to zero over the last so many of --examples"
    )
    command.add_argument("--log-every", type=float, default=Schedule.log_every_s, help="seconds (default: %(default)s)")
    command.add_argument(
        "--evaluate-every", type=float, default=Schedule.evaluate_every_s, help="seconds (default: %(default)s)"
    )
    command.add_argument(
        "--save-every", type=float, default=Schedule.save_every_s, help="seconds (default: %(default)s)"
    )
    command.add_argument("--evaluate-every-steps", type=int, default=0, help="evaluate after every so many steps, too")
    command.add_argument("--save-every-steps", type=int, default=0, help="save after every so many steps, too")
    command.add_argument("--threads", type=int, help="CPU threads of a rank (default: its share of the machine's)")
    command.add_argument("--side", type=int, help="train at this side, whatever the preset's curriculum says")
    command.add_argument(
        "--start-from", type=Path, help="what a new run starts from: a weights folder, a run's folder or a state's file"
    )
    command.add_argument(
        "--accumulation", type=int, help="take a step's batch in so many parts, whatever the preset says"
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, memory and FLOP, and stop"
    )
    command.add_argument("--ranks", type=int, default=1, help="with --dry-run: reckon this many ranks, too")
    command.add_argument(
        "--parallel", choices=PARALLEL, help="how weights are laid over the ranks (default: ddp under torchrun)"
    )
    command.add_argument(
        "--hang-timeout", type=float, default=300.0, help="seconds after which ranks end that wait for one that hangs"
    )
    command.add_argument(
        "--loader-workers", type=int, help="processes that draw batches (default: 4 with a GPU, else 0)"
    )
    command.add_argument("--loader-ahead", type=int, help="batches each has ready (default: 2 with workers, else 1)")
    command.add_argument("--metrics-address", help="host:port at which Prometheus asks the first rank")


def fit(flags: argparse.Namespace, row: Preset, environment: Mapping[str, str]) -> None:
    """Train `row` as the flags say.

    Raises:
        ValueError: a flag is out of its range; the message names it.
        SystemExit: a signal ended the run before it had what was asked for: 128 + the signal's number, so that whoever
            waits for it (a Job, say) does not take it for done.
    """
    _check_ranges(flags)
    if flags.examples and flags.examples > preset(row.name).total_examples:
        raise ValueError(
            f"--examples: {flags.examples} is more than the {preset(row.name).total_examples} of {row.name}"
        )
    with open_ranks(flags.parallel, environment) as (ranks, device), ExitStack() as stack:
        set_num_threads(flags.threads or max(1, (os.cpu_count() or 1) // int(environment.get("LOCAL_WORLD_SIZE", 1))))
        prepared = open_prepared(flags.data)
        trainer, skipped = open_run(row, open_source(row, prepared), flags.run, device, flags.start_from, ranks)
        for line in skipped:
            logging.warning("passed over: %s", line)
        if flags.weights and not flags.replace:  # before the work; `publish` checks again
            check_replaced(flags.weights, row.stage, _surely_seen(trainer, flags), row.unet)
        trainer.loader = _loader(flags, on_gpu=device.type == "cuda")
        if ranks.world > 1:
            trainer.watchdog = open_watchdog(ranks, flags.hang_timeout, environment)
        ranks.led(lambda: describe_run(trainer, prepared))
        if ranks.leads:
            trainer.recorders = stack.enter_context(_recorders(trainer, flags.metrics_address))
        if ranks.leads and trainer.state.step and trainer.warm_start is None:
            logging.info("%s: goes on at step %d", trainer.folder, trainer.state.step)
        _train(trainer, flags)
        if flags.weights and not trainer.hurried:
            average = trainer.average_weights()
            path = ranks.led(
                lambda: publish(trainer, flags.weights, prepared.fingerprint, average=average, replace=flags.replace)
            )
            if path is not None:
                print(path)
        if ranks.leads:
            _say_where(trainer, flags)
        if trainer.hurried:
            sys.exit(128 + (trainer.signalled or signal.SIGTERM))  # another rank was sent it


def _surely_seen(trainer: Trainer, flags: argparse.Namespace) -> int:
    """Examples that the weights will have seen that the run publishes.

    One that time ends may get as far as its end, unless what is published is of another architecture: such a run does not
    count on from there, and has all of that before it.
    """
    row = trainer.preset
    begins_anew = flags.seconds is not None and differences(flags.weights, row.stage, row.unet)
    return trainer.state.examples if begins_anew else _end(trainer, flags.examples)


def _end(trainer: Trainer, examples: int | None) -> int:
    """Examples that the run will have seen: it ends on a whole batch, and does not go back."""
    row = trainer.preset
    end = min(examples or row.total_examples, row.total_examples)
    return max(trainer.state.examples, math.ceil(end / row.batch) * row.batch)


def _check_ranges(flags: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(flags, name)
        if value is not None and not value >= least:  # so worded, a NaN is refused, too
            raise ValueError(f"--{name.replace('_', '-')}: {value} is not {least} or more")
    if not 0.0 < flags.hang_timeout < math.inf:
        raise ValueError(f"--hang-timeout: {flags.hang_timeout} is not a positive time")


def at_side(row: Preset, side: int) -> Preset:
    """The preset, trained at one side.

    Raises:
        ValueError: the stage has no such side.
    """
    if side < row.unet.granularity or side % row.unet.granularity or side > stage(row.stage).size:
        raise ValueError(
            f"--side: {side} is not a multiple of {row.unet.granularity} up to {stage(row.stage).size}, as {row.name} needs"
        )
    return replace(row, curriculum=((0, side),))


def cooled_down(row: Preset, examples: int | None, cooldown: int) -> Preset:
    """The preset, ended at `examples` (None: where it ends) by a cooldown.

    Raises:
        ValueError: the cooldown is longer than that.
    """
    end = min(examples or row.total_examples, row.total_examples)
    if cooldown > end:
        raise ValueError(f"--cooldown: {cooldown} is more than the {end} examples of the run")
    return replace(row, total_examples=end, cooldown_examples=cooldown)


def open_source(row: Preset, prepared: Prepared) -> Source:
    """Where the preset's batches come from.

    Raises:
        ValueError: the captions were encoded by another text encoder than the preset's; or there are no pairs to train on,
            or none to evaluate on, which a run is not begun without: nobody would see whether it learns.
    """
    width = prepared.states.shape[1]
    if row.unet.text_width and (prepared.text_encoder, width) != (row.text_encoder, row.unet.text_width):
        theirs, ours = (name or "the packaged encoder" for name in (prepared.text_encoder, row.text_encoder))
        raise ValueError(
            f"--data: captions are encoded by {theirs!r}, {width} wide; {row.name} reads {ours!r}, "
            f"{row.unet.text_width} wide: run `python -m trainer prepare --preset {row.name}`"
        )
    if row.unet.scale == 1:
        source: Source = NeighborSource(prepared=prepared, preset=row)
        source.check()
        return source
    spec = stage(row.stage)
    if spec.size <= RENDER_SIZE:
        pixels, owners = prepared.pictures[RENDER_SIZE], np.arange(len(prepared.keys))
    else:
        folder = prepared.folder / f"crops-{DRAWN_SIZE}"
        pixels, owners = np.load(folder / "pixels.npy", mmap_mode="r"), np.load(folder / "owners.npy")
    source = CropSource(prepared=prepared, preset=row, spec=spec, pixels=pixels, owners=owners)
    source.check()
    return source


def _loader(flags: argparse.Namespace, *, on_gpu: bool) -> Loader:
    workers = flags.loader_workers if flags.loader_workers is not None else 4 * on_gpu
    ahead = flags.loader_ahead if flags.loader_ahead is not None else 2 if workers else 1
    return Loader(ahead=ahead, workers=workers)


def _say_where(trainer: Trainer, flags: argparse.Namespace) -> None:
    """How far the run is, and how it goes on."""
    state, end = trainer.state, _end(trainer, flags.examples)
    more = "; the same command goes on" if state.examples < end else ""
    logging.info("%s: step %d, %d of %d examples%s", trainer.folder, state.step, state.examples, end, more)


def describe_run(trainer: Trainer, prepared: Prepared) -> None:
    """Write down what a run is, in its folder, and say what it was started from."""
    listing = trainer.warm_start
    for line in listing.lines() if listing is not None else ():
        logging.info(line)
    describe(
        trainer.folder,
        trainer.preset,
        prepared,
        trainer.ranks,
        command=sys.argv[1:],
        device=str(trainer.device),
        step=trainer.state.step,
        warm_start=listing.to_json() if listing is not None else None,
    )


@contextmanager
def _recorders(trainer: Trainer, metrics_address: str | None) -> Iterator[list[Recorder]]:
    """What hears of the run: TensorBoard; Prometheus where an address is given; lines where there is no terminal."""
    board = TensorBoardLog(trainer.folder, trainer.state.step)
    found: list[Recorder] = [board]
    if not sys.stderr.isatty():
        found.append(LogLines())
    with ExitStack() as stack:
        stack.callback(board.close)
        if metrics_address:
            host, port = _host_and_port(metrics_address)
            registry = process_registry("trainer", revision=code_digest()[:12])
            found.append(TrainingMetrics(registry, trainer.preset.name))
            endpoint = MetricsEndpoint(registry, host=host, port=port)
            stack.callback(endpoint.close)
            logging.info("metrics at http://%s:%d/metrics", host, endpoint.port)
        yield found


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--metrics-address: {address!r} is not host:port")
    return host.strip("[]"), int(port)


class LogLines:
    """Recorder that writes the log's lines for people, where there is no bar."""

    def stepped(self, figures: dict[str, float], examples: int) -> None:
        """Single steps are too many to read."""

    def logged(self, line: dict[str, Any]) -> None:
        """A line of the log was written."""
        named = {name: value for name, value in line.items() if isinstance(value, float)}
        figures = " ".join(f"{name}={value:.4g}" for name, value in named.items())
        logging.info("step %d, %d examples, %s: %s", line["step"], line["examples"], line["kind"], figures)

    def saved(self, seconds: float) -> None:
        """A state was saved in so many seconds."""
        logging.info("state saved in %.1f s", seconds)

    def pictured(self, name: str, picture: np.ndarray, step: int) -> None:
        """Pictures lie in the run's folder."""


def _train(trainer: Trainer, flags: argparse.Namespace) -> None:
    started, first = time.monotonic(), trainer.state.examples
    end = min(flags.examples or trainer.preset.total_examples, trainer.preset.total_examples)
    trainer.stopping = first >= end  # a start whose examples are reached takes no step more
    silent = None if trainer.ranks.leads else True  # None: where there is no terminal
    with tqdm(desc=trainer.preset.name, total=end, initial=first, unit="ex", mininterval=2.0, disable=silent) as bar:

        def show(examples: int, figures: dict[str, float]) -> None:
            bar.update(examples - bar.n)
            bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            out_of_time = flags.seconds is not None and time.monotonic() - started > flags.seconds
            trainer.stopping = trainer.stopping or out_of_time or examples >= end

        trainer.run(_schedule(flags), show, look)


def _schedule(flags: argparse.Namespace) -> Schedule:
    return Schedule(
        log_every_s=flags.log_every,
        evaluate_every_s=flags.evaluate_every,
        save_every_s=flags.save_every,
        evaluate_every_steps=flags.evaluate_every_steps,
        save_every_steps=flags.save_every_steps,
    )
