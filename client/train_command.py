"""`reimagen train`: runs are started, looked at, watched, ended, exported, deleted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from client.command_line import connected, print_json, print_table
from client.outputs import check_folder, write_output
from client.train_display import make_train_display
from client.training_calls import EXECUTORS, PARALLEL, STATES, TrainingFailed
from client.training_types import PodResources, Run, RunEvent, RunSpec, SampleGrid


def add_train(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands and their flags."""
    train = commands.add_parser("train", help="training runs").add_subparsers(required=True, metavar="COMMAND")
    json_flag = argparse.ArgumentParser(add_help=False)
    json_flag.add_argument("--json", action="store_true", help="print JSON")

    def command(name: str, body: Any, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        parser = train.add_parser(name, parents=[shared, json_flag], help=text)
        if named:
            parser.add_argument("name", metavar="NAME", help="of the run")
        parser.set_defaults(body=body)
        return parser

    start = command("start", _start, "start a run, or go on with one that has ended", named=False)
    _add_start_flags(start)
    command("get", _get, "one run")
    listing = command("list", _list, "all of them", named=False)
    listing.add_argument("--state", action="append", default=[], choices=STATES, help="may be repeated")
    watch = command("watch", _watch, "figures and sample grids until the run is over; status 1 if it failed")
    for parser in (start, watch):
        parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the sample grids here")
    watch.add_argument("--from-step", type=int, default=0, metavar="N", help="begin at this step (default: the first)")
    command("cancel", _cancel, "end a run, its state saved")
    export = command("export", _export, "write a run's averaged weights for serving")
    export.add_argument("--weights", required=True, metavar="FOLDER", help="under the service's weights folder")
    export.add_argument("--replace", action="store_true", help="also weights that saw more examples than this run")
    delete = command("delete", _delete, "remove a run that is over: states, logs, sample grids")
    delete.add_argument("--missing-ok", action="store_true", help="where there is no such run, do nothing")
    for parser in (start, export):
        parser.add_argument("--request-id", default="", metavar="UUID", help="the same again does nothing again")


def _add_start_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="", help="of the run (default: the service makes one)")
    parser.add_argument("--preset", required=True, metavar="NAME", help="what is trained")
    parser.add_argument(
        "--data", required=True, metavar="FOLDER", help="prepared corpus, under the service's data folder"
    )
    parser.add_argument("--examples", type=int, default=0, metavar="N", help="in all (default: the preset's)")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop after so long")
    parser.add_argument("--evaluate-every", type=float, metavar="S", help="seconds between evaluations")
    parser.add_argument("--log-every", type=float, metavar="S", help="seconds between lines of figures")
    parser.add_argument("--save-every", type=float, metavar="S", help="seconds between saved states")
    parser.add_argument("--evaluate-every-steps", type=int, default=0, metavar="N", help="by steps, too")
    parser.add_argument("--save-every-steps", type=int, default=0, metavar="N", help="by steps, too")
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="processes that train together (default: 1)")
    parser.add_argument(
        "--parallel", choices=PARALLEL, default="", help="how weights are laid over ranks (default: ddp)"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads of each")
    parser.add_argument("--side", type=int, default=0, metavar="PIXELS", help="train at this side")
    parser.add_argument(
        "--start-from", default="", metavar="FOLDER", help="weights, under the service's weights folder"
    )
    parser.add_argument("--executor", choices=EXECUTORS, default="", help="where (default: the service's own)")
    pod = parser.add_argument_group("of a cluster", "what each pod gets (default: as the service is set)")
    pod.add_argument("--ranks-per-pod", type=int, metavar="N")
    pod.add_argument("--gpus", type=int, metavar="N")
    pod.add_argument("--cpus", type=int, metavar="N")
    pod.add_argument("--memory-bytes", type=int, metavar="N")
    parser.add_argument("--watch", action="store_true", help="watch it until it is over")


def _start(flags: argparse.Namespace) -> int:
    amounts = {
        name: value
        for name, value in (
            ("ranks", flags.ranks_per_pod),
            ("gpus", flags.gpus),
            ("cpus", flags.cpus),
            ("memory_bytes", flags.memory_bytes),
        )
        if value is not None
    }
    spec = RunSpec(
        preset=flags.preset,
        data=flags.data,
        examples=flags.examples,
        limit_s=flags.seconds,
        evaluate_every_s=flags.evaluate_every,
        log_every_s=flags.log_every,
        save_every_s=flags.save_every,
        evaluate_every_steps=flags.evaluate_every_steps,
        save_every_steps=flags.save_every_steps,
        parallel=flags.parallel,
        ranks=flags.ranks,
        threads=flags.threads,
        side=flags.side,
        start_from=flags.start_from,
        executor=flags.executor,
        pod=PodResources(**amounts) if amounts else None,
    )
    if flags.out:
        check_folder(flags.out)
    with connected(flags, trainer=True) as client:
        run = client.trainer.start(spec, name=flags.name, request_id=flags.request_id)
        if not (flags.watch or flags.out):
            _print_run(flags, run)
            return 0
        # Of a run that goes on what it said before is not said again.
        from_step = run.progress.step if run.progress else 0
        return _followed(flags, client.trainer.watch(run.name, from_step=from_step, samples=bool(flags.out)))


def _get(flags: argparse.Namespace) -> int:
    with connected(flags, trainer=True) as client:
        run = client.trainer.get(flags.name)
    if flags.json:
        print_json(run)
        return 0
    fields = ("name", "state", "attempt", "place", "status", "created_at", "started_at", "ended_at", "error")
    rows = [(field, getattr(run, field)) for field in fields if getattr(run, field)]
    rows += [(name, value) for name, value in vars(run.spec).items() if value]
    rows += [(name, value) for name, value in vars(run.progress).items() if value] if run.progress else []
    rows += [("export", f"{run.export.state} {run.export.status}".rstrip())] if run.export else []
    print_table(("field", "value"), rows)
    return 0


def _list(flags: argparse.Namespace) -> int:
    with connected(flags, trainer=True) as client:
        runs = list(client.trainer.list(states=flags.state))
    if flags.json:
        print_json(runs)
    else:
        columns = ("run", "state", "preset", "examples", "of", "loss", "examples/s")
        print_table(columns, [_row(run) for run in runs], uncut="run")
    return 0


def _watch(flags: argparse.Namespace) -> int:
    if flags.out:
        check_folder(flags.out)
    with connected(flags, trainer=True) as client:
        events = client.trainer.watch(flags.name, from_step=flags.from_step, samples=bool(flags.out))
        return _followed(flags, events)


def _cancel(flags: argparse.Namespace) -> int:
    with connected(flags, trainer=True) as client:
        _print_run(flags, client.trainer.cancel(flags.name))
    return 0


def _delete(flags: argparse.Namespace) -> int:
    with connected(flags, trainer=True) as client:
        client.trainer.delete(flags.name, missing_ok=flags.missing_ok)
    print_json({"deleted": flags.name}) if flags.json else print(flags.name)
    return 0


def _export(flags: argparse.Namespace) -> int:
    display = make_train_display()
    with connected(flags, trainer=True) as client, display.live():
        exported = client.trainer.export(
            flags.name,
            flags.weights,
            on_progress=display.exported,
            request_id=flags.request_id,
            replace=flags.replace,
        )
    print_json(exported) if flags.json else print(exported.status)
    return 0


def _followed(flags: argparse.Namespace, events: Iterable[RunEvent]) -> int:
    """Show what a run says, and write its grids.

    Raises:
        TrainingFailed: it has not succeeded.
    """
    display, run, grids = make_train_display(), None, list[Path]()
    try:
        with display.live():
            for event in events:
                display.show(event)
                if isinstance(event, Run):
                    run = event
                elif isinstance(event, SampleGrid) and flags.out:
                    path = write_output(flags.out / f"samples-{event.examples:09d}.png", event.png)
                    if path not in grids:
                        grids.append(path)
    except KeyboardInterrupt:
        if run is not None:  # whoever ends a watch may think that the run ends with it
            print(f"{run.name} goes on; `reimagen train cancel {run.name}` ends it", file=sys.stderr, flush=True)
        raise
    if flags.json:
        print_json({"run": run, "samples": [str(path) for path in grids]})
    else:
        for path in grids:
            print(path)
    if run is None or run.state != "succeeded":
        why = f": {run.error}" if run and run.error else ""
        raise TrainingFailed("ABORTED", f"run {run.name if run else flags.name} {run.state if run else 'is gone'}{why}")
    return 0


def _print_run(flags: argparse.Namespace, run: Run) -> None:
    if flags.json:
        print_json(run)
    else:
        print(run.name)


def _row(run: Run) -> tuple[object, ...]:
    state = "cancelling" if run.cancelling else run.state
    far = run.progress
    if far is None:
        return run.name, state, run.spec.preset, 0, "", "", ""
    loss = "" if far.loss is None else f"{far.loss:.4f}"
    return run.name, state, run.spec.preset, far.examples, far.total_examples, loss, f"{far.examples_per_second:.1f}"
