"""Everything that the dashboards show, running: the local stack and what is beside it, and a Prometheus over all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import start_http_server

from client import RunSpec, TrainingFailed
from client.display import Display
from client.trainer import TrainerClient
from deploy.local.children import Child, ChildFailed, running
from deploy.local.supervision import Supervision
from deploy.local.up import HOST, StackSettings, down, up
from deploy.monitoring.dashboards.live.prometheus import (
    GPU_MONITOR,
    Prometheus,
    Target,
    metric_relabelings,
    running_prometheus,
)
from deploy.monitoring.dashboards.live.stand_ins import stand_ins

NUM_PORTS = 20
PRESET, SIDE = "demo-64", 16  # of pictures so small that a step is short
LOG_EVERY_S = 0.1  # shorter than the steps from one evaluation to the next, or there would be no line of them
SCRAPED_S, LEARNT_S, POLL_S = 240.0, 300.0, 0.2
RUN = "watched"
LEARNT = (  # of the run, and of the training
    "reimagen_trainer_runs_loss",
    "reimagen_trainer_held_out_loss",
    "reimagen_trainer_checkpoint_last_success_timestamp_seconds",
)
_OFFSETS = {"retrieval": 1, "generator": 3, "triton": 5, "trainer": 9}  # of the stack's metrics
_CALLED = {"generator": 2, "retrieval": 0}


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What a session stands on.

    Attributes:
        weights: of the three stages.
        work: folder of a corpus and the knowledge base "demo" that is made of it.
        prepared: what `trainer prepare` and `trainer knn` wrote of a corpus.
        clip: the CLIP model of retrieval; empty: BM25 alone.
        first_port: of NUM_PORTS in a row.
        scrape_s: seconds between two scrapes.
        rules: files that Prometheus evaluates.
        steps_between: steps of a training from one held-out loss, and one saved state, to the next.
    """

    weights: Path
    work: Path
    prepared: Path
    clip: str
    first_port: int
    scrape_s: float
    rules: tuple[Path, ...]
    steps_between: int


@dataclass(frozen=True, kw_only=True)
class Session:
    """What runs.

    Attributes:
        generators: addresses; the first draws in Triton, the second by itself and has room for two orders.
        retrieval: address.
        started: when Prometheus had read every target and what both trainings learnt first, in seconds since 1970.
    """

    generators: tuple[str, str]
    retrieval: str
    prometheus: Prometheus
    started: float
    state: Path

    def kill(self, program: str) -> None:
        """End a program of the stack at once; its supervisor starts it again."""
        for state in Supervision(self.state).states():
            if state.name == program and state.pid:
                os.kill(state.pid, signal.SIGKILL)


@contextmanager
def session(ground: Ground, folder: Path, display: Display) -> Iterator[Session]:
    """All of it, for as long as the block lasts.

    Raises:
        ChildFailed: something does not start or train, or Prometheus does not read it.
        GenerationFailed: the stack draws no picture.
    """
    state = folder / "stack"
    settings = StackSettings(
        weights=ground.weights, stages="triton", device="cpu", first_port=ground.first_port, clip=ground.clip
    )
    with ExitStack() as stack:
        beside = _beside(ground, folder)  # they load while the stack starts
        stack.callback(_end, beside)
        stack.callback(down, state)
        up(settings, state, ground.work, display)
        display.say("starting a generator, a trainer and a training beside it")
        stack.enter_context(running(beside))
        stack.callback(_end, [_training(ground, folder)])
        _start_run(ground)
        stack.callback(_cancel_run, ground)  # it would outlive the service
        targets = [*_targets(ground), *_made_up(ground, stack)]
        prometheus = stack.enter_context(
            running_prometheus(
                targets,
                folder / "prometheus",
                ground.first_port + 16,
                scrape_s=ground.scrape_s,
                rules=ground.rules,
            )
        )
        display.say("waiting for the first scrapes")
        _wait_scraped(prometheus, len(targets))
        display.say("waiting for the first steps of the trainings, and for a held-out loss")
        _wait_learnt(prometheus)
        yield Session(
            generators=(_address(ground, _CALLED["generator"]), _address(ground, 10)),
            retrieval=_address(ground, _CALLED["retrieval"]),
            prometheus=prometheus,
            started=time.time(),
            state=state,
        )


def _beside(ground: Ground, folder: Path) -> list[Child]:
    """A generator that draws by itself, and a trainer over the prepared corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    drawing = {
        "address": _address(ground, 10),
        "metrics-port": ground.first_port + 11,
        "stages": "embedded",
        "weights": ground.weights.absolute(),
        "retrieval-address": _address(ground, _CALLED["retrieval"]),
        "slots": 2,
        "max-waiting": 2,
        "without-retrieval": "draw",
    }
    training = {
        "address": _address(ground, 12),
        "metrics-port": ground.first_port + 13,
        "runs": folder / "runs",
        "data": ground.prepared.parent,
        "weights": folder / "weights",
    }
    return [
        Child("generator", ["generator_svc", "serve", *_flags(drawing)], folder / "generator.log"),
        Child("trainer", ["trainer.service", *_flags(training)], folder / "trainer.log"),
    ]


def _training(ground: Ground, folder: Path) -> Child:
    """One that Prometheus reads itself."""
    flags: dict[str, object] = {
        "preset": PRESET,
        "data": ground.prepared,
        "run": folder / "training",
        "metrics-address": _address(ground, 14),
        "side": SIDE,
        "threads": 1,
        "evaluate-every-steps": ground.steps_between,
        "save-every-steps": ground.steps_between,
    }
    return Child("training", ["trainer", "fit", *_flags(flags)], folder / "training.log")


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.terminate()
    for child in children:
        child.wait()


def _start_run(ground: Ground) -> None:
    spec = RunSpec(
        preset=PRESET,
        data=ground.prepared.name,
        side=SIDE,
        threads=1,
        log_every_s=LOG_EVERY_S,
        evaluate_every_steps=ground.steps_between,
        save_every_steps=ground.steps_between,
    )
    with TrainerClient(_address(ground, 12)) as trainer:
        trainer.start(spec, name=RUN)


def _cancel_run(ground: Ground) -> None:
    with suppress(TrainingFailed), TrainerClient(_address(ground, 12)) as trainer:
        trainer.cancel(RUN)


def _targets(ground: Ground) -> list[Target]:
    ports = [*_OFFSETS.items(), ("generator", 11), ("trainer", 13), ("training", 14)]
    return [Target(job=job, address=_address(ground, offset)) for job, offset in ports]


def _made_up(ground: Ground, stack: ExitStack) -> list[Target]:
    targets = []
    for offset, (job, registry) in enumerate(stand_ins().items(), start=17):
        server, thread = start_http_server(ground.first_port + offset, addr=HOST, registry=registry)
        stack.callback(_close, server, thread)
        relabelings = metric_relabelings(GPU_MONITOR) if job == "dcgm-exporter" else ()
        targets.append(Target(job=job, address=_address(ground, offset), relabelings=relabelings))
    return targets


def _close(server: object, thread: threading.Thread) -> None:
    server.shutdown()  # type: ignore[attr-defined]
    server.server_close()  # type: ignore[attr-defined]
    thread.join()


def _wait_scraped(prometheus: Prometheus, num_targets: int) -> None:
    give_up = time.monotonic() + SCRAPED_S
    while True:
        health = prometheus.targets()
        if len(health) == num_targets and all(each == "up" for each in health.values()):
            return
        if time.monotonic() > give_up:
            away = [address for address, said in health.items() if said != "up"]
            raise ChildFailed(f"prometheus: does not read {', '.join(away)}")
        time.sleep(POLL_S)


def _wait_learnt(prometheus: Prometheus) -> None:
    """Under load a step takes twenty times as long: the first are taken before anybody asks for anything."""
    give_up = time.monotonic() + LEARNT_S
    while silent := [name for name in LEARNT if not prometheus.at(name, time.time())]:
        if time.monotonic() > give_up:
            raise ChildFailed(f"training: nothing of {', '.join(silent)}")
        time.sleep(POLL_S)


def _address(ground: Ground, offset: int) -> str:
    return f"{HOST}:{ground.first_port + offset}"


def _flags(given: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in given.items()]
