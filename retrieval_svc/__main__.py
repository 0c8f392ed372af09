"""`python -m retrieval_svc build` makes an index of a corpus; `serve` answers from it."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
from prometheus_client import CollectorRegistry
from reimagen.retrieval.v1 import retrieval_pb2_grpc
from tqdm import tqdm

from common.corpus import CorpusError
from common.service.command import run_command
from common.service.config import ConfigError, add_flags, read_settings, setting
from common.service.logs import configure_logs
from common.service.metrics import process_registry
from common.service.server import ServerSettings, die_with_parent, serve
from retrieval_svc.index_build import build_index
from retrieval_svc.index_folder import IndexFolderError
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.metrics import RetrievalMetrics
from retrieval_svc.servicer import SERVICE_NAME, RetrievalServicer

PREFIX = "REIMAGEN_RETRIEVAL_"
EXPECTED = (CorpusError, ConfigError, IndexFolderError)


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(ServerSettings):
    """What the retrieval service is told, by flags or by REIMAGEN_RETRIEVAL_ variables."""

    index: Path = setting(help="folder of the index, as made by `build`")  # noqa: RUF009 (a field)
    search_threads: int = setting(default=2, help="searches that run at once")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status (2 and one line on standard error for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m retrieval_svc", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make an index of a corpus", description="Make an index of a corpus.")
    build.add_argument("--corpus", type=Path, required=True, metavar="FOLDER", help="a corpus (common/corpus.py)")
    build.add_argument("--index", type=Path, required=True, metavar="FOLDER", help="where the index goes")
    serving = commands.add_parser("serve", help="answer from an index", description=RetrievalSettings.__doc__)
    add_flags(serving, RetrievalSettings)
    flags = parser.parse_args(arguments)
    body = partial(_build, flags.corpus, flags.index) if flags.command == "build" else partial(_serve, vars(flags))
    return run_command("retrieval_svc", body, expected=EXPECTED)


def _build(corpus: Path, index: Path) -> None:
    with tqdm(desc="index", unit=" pairs", total=None, disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        built = build_index(corpus, index, report)
    print(f"{'built' if built else 'up to date'}: {index}")


def _serve(flags: dict[str, object]) -> None:
    settings = read_settings(RetrievalSettings, prefix=PREFIX, environ=os.environ, flags=flags)
    if settings.parent_pid:
        die_with_parent(settings.parent_pid)
    configure_logs(service="retrieval", level=settings.log_level, style=settings.log_style)
    registry = process_registry()
    asyncio.run(serve(settings, opened=partial(_opened, settings, registry), registry=registry))


@asynccontextmanager
async def _opened(
    settings: RetrievalSettings, registry: CollectorRegistry, server: grpc.aio.Server
) -> AsyncIterator[Sequence[str]]:
    with (
        closing(await asyncio.to_thread(KnowledgeBase.open, settings.index)) as knowledge_base,
        ThreadPoolExecutor(settings.search_threads, thread_name_prefix="search") as executor,
    ):
        metrics = RetrievalMetrics(registry)
        metrics.pairs.labels(knowledge_base.name).set(knowledge_base.num_pairs)
        servicer = RetrievalServicer({knowledge_base.name: knowledge_base}, executor=executor, metrics=metrics)
        retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(servicer, server)
        yield (SERVICE_NAME,)


if __name__ == "__main__":
    sys.exit(main())
