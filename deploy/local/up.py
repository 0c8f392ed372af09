"""`make up` and `make down`: the whole stack as local processes that stay, and a table of where they are."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client import Client, GenerationFailed, StageOverrides
from client.display import Display
from common.files import write_atomic, write_json
from common.stages import STAGES
from deploy.local.children import NO_BARS, ROOT, ChildFailed
from deploy.local.knowledge_base import LIBRARY, NAME, ensure_knowledge_base
from deploy.local.supervision import LOGS, Program, Supervision
from deploy.local.working_copy import copy_library
from deploy.monitoring.manifests import RULES
from deploy.monitoring.tools import installed
from generator_svc.export import ExportSettings, export
from generator_svc.model_versions import prune

HOST = "127.0.0.1"
READY_S = 240.0
POLL_S = 0.2
CANARY_S = 120.0
CANARY_PROMPT = "a guide dog, noto style, on a blue background"
CANARY_STEPS = 2
SETTINGS = "stack.json"
PROMETHEUS = "prometheus"
MODELS = "models"
TRAINER, TRAINING = "trainer", "training"  # and the folder of its runs and weights; corpora are prepared under runs/
ADMIN_KEY = "triton.key"


@dataclass(frozen=True, kw_only=True)
class StackSettings:
    """What a stack is made of.

    Attributes:
        weights: folder of the stages' weights.
        stages: where the U-Nets run: `triton`, or `embedded` in the generator.
        device: cpu, cuda or cuda:N.
        first_port: of the ports, which follow one another in the order of the table.
        clip: the CLIP model of the retrieval service, see its settings.
    """

    weights: Path
    stages: str
    device: str
    first_port: int
    clip: str


def up(settings: StackSettings, folder: Path, work: Path, display: Display) -> str:
    """Start the stack in `folder`, and give its table when it has drawn a picture; one that is up is left as it is.

    Args:
        work: folder of the demonstration knowledge base, which the stack takes a copy of at its first start.

    Raises:
        ChildFailed: a process does not start, a port is taken, or the stack that is up has other settings.
        GenerationFailed: no picture is drawn.
    """
    supervision, described = Supervision(folder), _described(settings)
    programs = _programs(settings, folder)
    if supervision.is_up():
        if json.loads((folder / SETTINGS).read_text()) != described:
            raise ChildFailed(f"{folder}: a stack with other settings is up; `make down` ends it")
    else:
        _check_ports(programs)
        display.say("preparing the knowledge base")
        _make_library(folder, ensure_knowledge_base(work, display), work / "corpus", settings.clip)
        if settings.stages == "triton":
            display.say("exporting the model repository")
            given = ExportSettings(weights=settings.weights, repository=folder / MODELS, device=settings.device)
            for model in export(given):
                prune(folder / MODELS / model, given.keep)
        write_atomic(folder / "prometheus.yml", _prometheus_config(programs).encode())
        write_json(folder / SETTINGS, described)
        display.say("starting " + ", ".join(program.name for program in programs))
        supervision.start(programs)
    try:
        _wait_serving(supervision, programs)
        display.say("drawing a canary picture")
        _draw_canary(_address(programs, "generator"))
    except (ChildFailed, GenerationFailed):
        supervision.stop()
        raise
    return table(programs, supervision)


def down(folder: Path) -> bool:
    """End the stack of `folder`, whose knowledge bases stay; gives whether one was up."""
    return Supervision(folder).stop()


def status(folder: Path) -> str:
    """The table of the stack.

    Raises:
        ChildFailed: none is up.
    """
    supervision = Supervision(folder)
    return table(programs_of(supervision), supervision)


def programs_of(supervision: Supervision) -> list[Program]:
    """What the stack is made of.

    Raises:
        ChildFailed: none is up.
    """
    folder = supervision.folder
    if not supervision.is_up():
        raise ChildFailed(f"{folder}: no stack is up; `make up` starts one")
    said = json.loads((folder / SETTINGS).read_text())
    settings = StackSettings(**(said | {"weights": Path(said["weights"])}))
    return _programs(settings, folder)


def table(programs: Sequence[Program], supervision: Supervision) -> str:
    """Where everything is: a line for each process, then the folders."""
    states = {state.name: state for state in supervision.states()}
    rows: list[tuple[str, ...]] = [("process", "state", "pid", "address", "metrics", "log")]
    for program in programs:
        state = states.get(program.name)
        metrics = f"http://{HOST}:{program.metrics_port}/metrics" if program.metrics_port else "-"
        log = _relative(supervision.log(program.name))
        said = (state.state.lower(), str(state.pid)) if state else ("-", "-")
        rows.append((program.name, *said, program.address, metrics, log))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    folder = _relative(supervision.folder)
    where = {name: _address(programs, name) for name in ("generator", "retrieval", TRAINER)}
    return "\n".join(
        [
            *lines,
            f"state in {folder}: knowledge bases, models, {LOGS}/; `make down` ends it",
            "export " + " ".join(f"REIMAGEN_{name.upper()}={address}" for name, address in where.items()),
        ]
    )


def _programs(settings: StackSettings, folder: Path) -> list[Program]:
    """The processes, each with its ports: an address and its metrics' beside it."""
    folder, first = folder.absolute(), settings.first_port
    ports = {name: first + 2 * i for i, name in enumerate(("retrieval", "generator", "triton", PROMETHEUS, TRAINER))}
    retrieval = _service("retrieval", ports, {"data": folder / LIBRARY, "clip": settings.clip})
    drawn: dict[str, object] = {"retrieval-address": retrieval.address, "stages": settings.stages}
    programs = [retrieval]
    if settings.stages == "triton":
        programs.append(_triton(folder, ports["triton"]))
        drawn["triton-addresses"] = programs[-1].address
    else:
        drawn |= {"weights": settings.weights.absolute(), "device": settings.device}
    programs.append(_service("generator", ports, drawn))
    kept: dict[str, object] = {
        "runs": folder / TRAINING / "runs",
        "data": ROOT / "runs",
        "weights": folder / TRAINING / "weights",
    }
    programs.append(_service(TRAINER, ports, kept))
    if prometheus := installed(PROMETHEUS):
        programs.append(_prometheus(prometheus, folder, ports[PROMETHEUS]))
    return programs


def _service(name: str, ports: dict[str, int], settings: dict[str, object]) -> Program:
    command = {
        "retrieval": ("retrieval_svc", "serve"),
        "generator": ("generator_svc", "serve"),
        TRAINER: ("trainer.service",),  # `trainer serve` without a first look at torch
    }[name]
    address, metrics_port = f"{HOST}:{ports[name]}", ports[name] + 1
    flags = settings | {"address": address, "metrics-port": metrics_port}
    return Program(
        name=name,
        command=[sys.executable, "-m", *command, *(f"--{flag}={value}" for flag, value in flags.items())],
        environment=NO_BARS,
        address=address,
        metrics_port=metrics_port,
    )


def _triton(folder: Path, port: int) -> Program:
    flags = {"repository": folder / MODELS, "port": port, "metrics-port": port + 1}
    flags |= {"log": folder / LOGS / "tritonserver.log", "admin-key-file": folder / ADMIN_KEY}
    return Program(
        name="triton",
        command=[sys.executable, "-m", "deploy.local", "serve-triton", *(f"--{k}={v}" for k, v in flags.items())],
        address=f"{HOST}:{port}",
        metrics_port=port + 1,
    )


def _prometheus(path: str, folder: Path, port: int) -> Program:
    return Program(
        name=PROMETHEUS,
        command=[
            path,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address={HOST}:{port}",
        ],
        address=f"http://{HOST}:{port}",
    )


def _prometheus_config(programs: Sequence[Program]) -> str:
    jobs = [
        {"job_name": program.name, "static_configs": [{"targets": [f"{HOST}:{program.metrics_port}"]}]}
        for program in programs
        if program.metrics_port
    ]
    every = {"scrape_interval": "5s", "evaluation_interval": "15s"}
    config = {"global": every, "rule_files": [str(RULES / "*.yaml")], "scrape_configs": jobs}
    return json.dumps(config, indent=2) + "\n"  # JSON is YAML


def _make_library(folder: Path, demonstration: Path, corpus: Path, clip: str) -> None:
    """The stack's own library: at the first start a copy of the demonstration's, later what has become of it. With CLIP it
    is imported again instead, since every pair needs an embedding."""
    library, done_mark = folder / LIBRARY, folder / "library.json"
    if done_mark.exists():  # an import that was cut short goes on
        return
    if clip:
        _import(library, corpus, clip)
    elif not library.exists():
        copy_library(demonstration, library)
    write_json(done_mark, {"corpus": str(corpus), "clip": clip})


def _import(library: Path, corpus: Path, clip: str) -> None:
    flags = {"knowledge-base": NAME, "data": library, "clip": clip}
    command = [sys.executable, "-m", "retrieval_svc", "import", str(corpus), *(f"--{k}={v}" for k, v in flags.items())]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ChildFailed(f"import of {corpus} ended with status {done.returncode}")


def _check_ports(programs: Sequence[Program]) -> None:
    for program in programs:
        port = int(program.address.rpartition(":")[2])
        for each in filter(None, (port, program.metrics_port)):
            with closing(socket.socket()) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, each))
                except OSError:
                    raise ChildFailed(f"{program.name}: port {each} is taken; --first-port names others") from None


def _wait_serving(supervision: Supervision, programs: Sequence[Program]) -> None:
    give_up = time.monotonic() + READY_S
    with Client(_address(programs, "generator"), retrieval=_address(programs, "retrieval")) as client:
        while waited := [service.address for service in client.health() if not service.is_serving]:
            supervision.check()
            if time.monotonic() > give_up:
                name = next(program.name for program in programs if program.address == waited[0])
                raise ChildFailed(f"{name}: not ready in time; its log ends with {supervision.last_line(name)!r}")
            time.sleep(POLL_S)


def _draw_canary(address: str) -> None:
    """Raises GenerationFailed where the stack draws no picture."""
    few = tuple(StageOverrides(stage=spec.size, steps=CANARY_STEPS) for spec in STAGES)
    with Client(address, timeout_s=CANARY_S) as client:
        client.generate(CANARY_PROMPT, knowledge_base=NAME, seed=0, stages=few)


def _address(programs: Sequence[Program], name: str) -> str:
    return next(program.address for program in programs if program.name == name)


def _described(settings: StackSettings) -> dict[str, Any]:
    return asdict(settings) | {"weights": str(settings.weights.absolute())}


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
