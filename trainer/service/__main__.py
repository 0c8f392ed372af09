"""`python -m trainer serve` starts, follows and exports runs; the place that builds the service. It imports no torch."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import grpc.aio
from prometheus_client import CollectorRegistry
from reimagen.trainer.v1 import trainer_pb2_grpc

from common.service.command import run_command
from common.service.config import ConfigError, add_flags, read_settings
from common.service.health import Health
from common.service.logs import configure_logs
from common.service.metrics import process_registry
from common.service.server import die_with_parent, serve
from trainer.service.executor import Executor
from trainer.service.exports import Exports
from trainer.service.kubernetes_api import KubernetesApi
from trainer.service.kubernetes_runs import KubernetesRuns
from trainer.service.local_runs import LocalRuns
from trainer.service.metrics import RunMetrics
from trainer.service.repeating import Repeating
from trainer.service.run_spec import ExecutorKind
from trainer.service.run_watch import RunWatch
from trainer.service.runs import Runs
from trainer.service.servicer import ADMIN_METHODS, SERVICE_NAME, TrainerServicer
from trainer.service.settings import PREFIX, TrainerSettings

LOCK = "service.lock"  # in the folder of the runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m trainer serve", description=TrainerSettings.__doc__)
    add_flags(parser, TrainerSettings)
    flags = vars(parser.parse_args(arguments))
    return run_command("trainer", partial(_serve, flags), expected=(ConfigError,))


def _serve(flags: dict[str, object]) -> None:
    settings = read_settings(TrainerSettings, prefix=PREFIX, environ=os.environ, flags=flags)
    settings.check()
    if settings.parent_pid:
        die_with_parent(settings.parent_pid)
    configure_logs(service="trainer", level=settings.log_level, style=settings.log_style)
    registry = process_registry("trainer", revision=settings.revision)
    health = Health()
    asyncio.run(
        serve(
            settings,
            opened=partial(opened, settings, registry, health=health),
            registry=registry,
            name="trainer",
            admin_methods=ADMIN_METHODS,
            health=health,
        )
    )


@asynccontextmanager
async def opened(
    settings: TrainerSettings, registry: CollectorRegistry, server: grpc.aio.Server, *, health: Health
) -> AsyncIterator[Sequence[str]]:
    """Find the runs and register the service with `server`; runs go on after the exit.

    Args:
        health: says when the service is about to end.

    Raises:
        ConfigError: the folder of the runs is another service's, or the cluster's configuration cannot be read.
    """
    with ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, _alone(settings.runs))
        folders = settings.folders()
        executors = _executors(settings)
        runs = await asyncio.to_thread(
            partial(
                Runs,
                folders,
                executors,
                default=settings.default_executor(),
                cancel_grace_s=settings.cancel_grace_s,
            )
        )
        exports = await asyncio.to_thread(partial(Exports, folders, log_bytes=settings.log_bytes))
        RunMetrics(runs, folders.run, registry)
        loops = {kind: _loop(runs, kind, settings) for kind in executors}
        exporting = Repeating("exports", exports.reconcile, pause_s=settings.poll_s)
        runs.on_change = lambda kind: loops[kind].wake()
        exports.on_change = exporting.wake
        for loop in (*loops.values(), exporting):
            await asyncio.to_thread(stack.enter_context, loop)
        watch = RunWatch(runs, root=folders.runs, poll_s=settings.poll_s)
        health.when_ending(watch.end)
        servicer = TrainerServicer(runs, exports, watch)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server)
        yield (SERVICE_NAME,)


def _executors(settings: TrainerSettings) -> dict[ExecutorKind, Executor]:
    executors: dict[ExecutorKind, Executor] = {}
    folders, cluster = settings.folders(), settings.cluster()
    if settings.local_runs:
        executors[ExecutorKind.LOCAL] = LocalRuns(
            folders, max_runs=settings.max_runs, grace_s=settings.cancel_grace_s, log_bytes=settings.log_bytes
        )
    if cluster is not None:
        api = KubernetesApi(
            cluster.namespace, kubeconfig=settings.kubernetes_config, timeout_s=settings.kubernetes_timeout_s
        )
        executors[ExecutorKind.KUBERNETES_JOB] = KubernetesRuns("Job", api, cluster, folders)
        executors[ExecutorKind.KUBERNETES_TRAIN_JOB] = KubernetesRuns("TrainJob", api, cluster, folders)
    return executors


def _loop(runs: Runs, kind: ExecutorKind, settings: TrainerSettings) -> Repeating:
    pause_s = settings.poll_s if kind == ExecutorKind.LOCAL else settings.kubernetes_poll_s
    return Repeating(f"runs-{kind}", partial(runs.reconcile, kind), pause_s=pause_s)


@contextmanager
def _alone(runs: Path) -> Iterator[None]:
    """Hold the folder of the runs: two services would start everything twice."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--runs: {runs} is the folder of another service that runs") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
