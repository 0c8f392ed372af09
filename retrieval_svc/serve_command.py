"""`python -m retrieval_svc serve`: puts the service together. It imports no torch: see `clip_worker.py`."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from functools import partial

import grpc.aio
from prometheus_client import CollectorRegistry
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc, retrieval_pb2_grpc

from common.service.config import ConfigError, add_flags, read_settings
from common.service.errors import ServiceError
from common.service.logs import configure_logs
from common.service.metrics import process_registry
from common.service.server import die_with_parent, serve
from retrieval_svc.admission import Admission
from retrieval_svc.allowed_images import AllowedImages
from retrieval_svc.knowledge_base_servicer import ADMIN_METHODS, KnowledgeBaseServicer
from retrieval_svc.knowledge_base_servicer import SERVICE_NAME as KNOWLEDGE_BASE_SERVICE
from retrieval_svc.library import Library, LibraryError
from retrieval_svc.metrics import IndexFigures, RetrievalMetrics
from retrieval_svc.opening import opened_library
from retrieval_svc.servicer import SERVICE_NAME, RetrievalServicer
from retrieval_svc.settings import PREFIX, RetrievalSettings
from retrieval_svc.upkeep import Upkeep
from retrieval_svc.worker_embedder import WorkerEmbedder

EXPECTED = (ConfigError, LibraryError)


def add_serve_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the commands; its body is `serve_library`."""
    parser = commands.add_parser("serve", help="answer lookups and take changes", description=RetrievalSettings.__doc__)
    parser.set_defaults(body=serve_library)
    add_flags(parser, RetrievalSettings)


def serve_library(flags: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        one of `EXPECTED`, or OSError: a setting, the data folder or a port cannot be used.
    """
    settings = read_settings(RetrievalSettings, prefix=PREFIX, environ=os.environ, flags=vars(flags))
    settings.check()
    if settings.parent_pid:
        die_with_parent(settings.parent_pid)
    configure_logs(service="retrieval", level=settings.log_level, style=settings.log_style)
    registry = process_registry("retrieval", revision=settings.revision)
    opening = partial(opened, settings, registry)
    asyncio.run(serve(settings, opened=opening, registry=registry, name="retrieval", admin_methods=ADMIN_METHODS))


@asynccontextmanager
async def opened(
    settings: RetrievalSettings, registry: CollectorRegistry, server: grpc.aio.Server
) -> AsyncIterator[Sequence[str]]:
    """Open the library and register both services with `server`; everything is closed on exit.

    Raises:
        LibraryError: the data folder is in use, or cannot be used.
        ConfigError: an allowed image prefix cannot be.
    """
    with ExitStack() as stack:
        images = AllowedImages(settings.allowed_image_prefixes())
        embedder: WorkerEmbedder | None = None
        if settings.clip:
            embedder = WorkerEmbedder(settings.clip, device=settings.clip_device, threads=settings.clip_threads)
            stack.enter_context(closing(embedder))
        opening = opened_library(
            settings.data, settings, embedder=embedder, uri_reader=images.read, bm25_process=settings.bm25_process
        )
        library = await asyncio.to_thread(stack.enter_context, opening)
        stack.enter_context(closing(Upkeep(library)))
        metrics = RetrievalMetrics(registry, indexes=partial(_index_figures, library))
        searches = _admission(stack, "search", settings.search_threads, settings.search_queue)
        changes = _admission(stack, "change", settings.change_threads, settings.change_queue)
        retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(
            RetrievalServicer(library, searches=searches, metrics=metrics), server
        )
        knowledge_base_pb2_grpc.add_KnowledgeBaseServiceServicer_to_server(
            KnowledgeBaseServicer(
                library, searches=searches, changes=changes, metrics=metrics, snapshots=settings.snapshots
            ),
            server,
        )
        yield (SERVICE_NAME, KNOWLEDGE_BASE_SERVICE)


def _admission(stack: ExitStack, name: str, threads: int, queue: int) -> Admission:
    executor = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix=name))
    return Admission(executor, at_work=threads, waiting=queue)


def _index_figures(library: Library) -> Iterator[IndexFigures]:
    for name in library.names():
        with suppress(ServiceError):  # deleted a moment ago
            knowledge_base = library.get(name)
            seen = knowledge_base.seen  # before what is stored: it never seems to see more than that
            yield IndexFigures(
                name=name, documents=knowledge_base.num_pairs, generation=knowledge_base.generation, seen=seen
            )
