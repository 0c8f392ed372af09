"""The retrieval service over real sockets: in this process, or as one of its own, with small knowledge bases."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc as kb_grpc
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from common.service.server import serve
from retrieval_svc.knowledge_base_servicer import ADMIN_METHODS
from retrieval_svc.serve_command import opened
from retrieval_svc.settings import RetrievalSettings

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20.0
EMBEDDING_SIZE = 8
STYLES = ("noto", "twemoji")
ENTITIES = ("guide dog", "hot dog", "red apple", "blue heart", "cat")


@dataclass(frozen=True, kw_only=True)
class Client:
    """A channel to a service, and its stubs."""

    address: str
    channel: grpc.Channel
    retrieval: Any
    bases: Any
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    log: Path = Path()
    process: Any = None

    def retrieve(self, prompt: str = "", **fields: Any) -> pb.RetrieveResponse:
        """One lookup."""
        return self.retrieval.Retrieve(pb.RetrieveRequest(prompt=prompt, **fields), timeout=TIMEOUT_S)

    def figure(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it was never set."""
        return self.registry.get_sample_value(name, labels) or 0.0


def connected(address: str, channel: grpc.Channel, **known: Any) -> Client:
    """The stubs of both services."""
    return Client(
        address=address,
        channel=channel,
        retrieval=pb_grpc.RetrievalServiceStub(channel),
        bases=kb_grpc.KnowledgeBaseServiceStub(channel),
        **known,
    )


def refusal(call: Any, *arguments: Any, **options: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **{"timeout": TIMEOUT_S, **options})
    return caught.value


@contextmanager
def hosted(data: Path, *, address: str = "", **settings: Any) -> Iterator[Client]:
    """A service in this process, on an event loop of its own."""
    loop, started, stop = asyncio.new_event_loop(), Future[str](), asyncio.Event()
    registry = CollectorRegistry()
    with tempfile.TemporaryDirectory() as folder:
        given = RetrievalSettings(data=data, address=address or f"unix:{folder}/r.sock", grace_s=2.0, **settings)

        async def work() -> None:
            try:
                await serve(
                    given,
                    opened=partial(opened, given, registry),
                    registry=registry,
                    admin_methods=ADMIN_METHODS,
                    announce=started.set_result,
                    stop=stop,
                )
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)

        thread = threading.Thread(target=loop.run_until_complete, args=(work(),), daemon=True)
        thread.start()
        try:
            reached = started.result(TIMEOUT_S)
            with grpc.insecure_channel(reached) as channel:
                yield connected(reached, channel, registry=registry)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(TIMEOUT_S)


@contextmanager
def spawned(
    data: Path, *flags: str, address: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[Client]:
    """A service as a process of its own, as it runs in production."""
    with tempfile.TemporaryDirectory() as folder:
        listening = address or f"unix:{folder}/r.sock"
        log = Path(folder) / "log"
        with log.open("wb") as stream:  # a pipe that nobody reads would fill up and stop it
            process = subprocess.Popen(
                [sys.executable, "-m", "retrieval_svc", "serve", "--data", str(data), "--address", listening, *flags],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            assert said[:1] == ["ready"], log.read_text()
            with grpc.insecure_channel(said[1]) as channel:
                yield connected(said[1], channel, log=log, process=process)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=TIMEOUT_S)


def picture(number: int) -> bytes:
    """A small PNG; another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 77)).save(stream, "PNG")
    return stream.getvalue()


def vector(number: int) -> list[float]:
    """An embedding; another for each number."""
    return np.random.default_rng(number).standard_normal(EMBEDDING_SIZE).tolist()


def make_pairs(entities: Sequence[str] = ENTITIES) -> list[kb_pb.NewPair]:
    """Every entity in every style, with a picture and an embedding of its own."""
    pairs = [(entity, style) for entity in entities for style in STYLES]
    return [
        kb_pb.NewPair(
            pair_id=f"{style}--{entity.replace(' ', '-')}",
            caption=f"{entity}, {style} style, on a white background",
            entity=entity,
            image=picture(number),
            facets={"style": style},
            author=f"author of {style}",
            source="https://example.org",
            license="CC-BY-4.0" if style == "noto" else "Apache-2.0",
            safe=style == "noto",
            attributes={"number": str(number)},
            embedding=vector(number),
        )
        for number, (entity, style) in enumerate(pairs)
    ]


def fill(client: Client, name: str = "small", pairs: Sequence[kb_pb.NewPair] | None = None, **options: Any) -> Any:
    """Make a knowledge base with these pairs; gives the answer of the last upsert."""
    facet = kb_pb.Facet(name="style", template="{value} style", values=STYLES)
    create = kb_pb.CreateKnowledgeBaseRequest(
        name=name, facets=[facet], scene_phrases=["on a white background"], embedding_size=EMBEDDING_SIZE
    )
    client.bases.CreateKnowledgeBase(create, timeout=TIMEOUT_S, **options)
    given = make_pairs() if pairs is None else pairs
    request = kb_pb.UpsertPairsRequest(knowledge_base=name, pairs=given)
    return client.bases.UpsertPairs(request, timeout=TIMEOUT_S, **options)


def caught_up(client: Client, name: str = "small") -> None:
    """Wait until BM25 sees all pairs."""
    request = kb_pb.GetKnowledgeBaseStatsRequest(knowledge_base=name)
    for _ in range(500):
        stats = client.bases.GetKnowledgeBaseStats(request, timeout=TIMEOUT_S)
        if stats.index_generation >= stats.stored_generation:
            return
        threading.Event().wait(0.02)
    raise AssertionError("the index does not catch up")
