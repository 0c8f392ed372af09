"""A cascade that draws noise in a second, a corpus of coloured squares, and both services on Unix sockets."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry

from client.display import Lines
from common.checkpoint import publish_stage
from common.corpus import Pair, write_corpus
from common.scenes import Scene, caption, scene_phrases
from common.service.health import Health
from common.service.server import Opened, ServerSettings, serve
from common.unet.config import UNetConfig
from common.unet.unet import UNet
from deploy.local.knowledge_base import ensure_knowledge_base
from generator_svc.__main__ import GeneratorSettings
from generator_svc.__main__ import opened as generator_opened
from retrieval_svc.iconify import FACETS, VERSION
from retrieval_svc.knowledge_base_servicer import ADMIN_METHODS
from retrieval_svc.serve_command import opened as retrieval_opened
from retrieval_svc.settings import RetrievalSettings

STYLES = ("noto", "twemoji", "openmoji")
ENTITIES = ("guide dog", "red apple", "steam locomotive", "old oak tree")
START_TIMEOUT_S = 60.0

T = TypeVar("T")

TINY_64 = UNetConfig(
    patch=4,
    widths=(8, 16),
    blocks=(1, 1),
    attention=(False, True),
    text_attention=(False, True),
    neighbor_attention=(True, True),
    head_width=8,
    text_width=384,
    embedding_width=16,
    scale=1,
    skip_scale=1.0,
    positions=True,
    placement=True,
)
TINY_256 = replace(
    TINY_64,
    patch=8,
    attention=(False, False),
    text_attention=(False, False),
    neighbor_attention=(False, False),
    text_width=0,
    scale=4,
    placement=False,
)
TINY_UNETS = {64: TINY_64, 256: TINY_256, 1024: replace(TINY_256, patch=32)}


def tiny_unet(size: int) -> UNet:
    """A U-Net with weights that are far enough from zero for every input to matter; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(size)
        unet = UNet(TINY_UNETS[size])
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.eval().requires_grad_(False)


def write_weights(folder: Path, examples: int = 0) -> Path:
    """Weights of all three stages, and how many examples they say they have seen."""
    for size, config in TINY_UNETS.items():
        publish_stage(folder, size, config, tiny_unet(size).state_dict(), {"examples": examples})
    return folder


def make_pairs() -> list[Pair]:
    """Every entity in every style, as an SVG of its own."""
    pairs: list[Pair] = []
    for e, entity in enumerate(ENTITIES):
        for s, style in enumerate(STYLES):
            shape = f'<rect x="{2 + s}" y="2" width="{10 + e}" height="12" fill="rgb({60 * e},{80 * s},120)"/>'
            pairs.append(
                Pair(
                    key=f"{style}--{entity.replace(' ', '-')}",
                    caption=caption(entity, style, Scene()),
                    image=f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{shape}</svg>'.encode(),
                    image_format="svg",
                    entity=entity,
                    facets={"style": style},
                    author=f"author of {style}",
                    source="https://example.org",
                    license="CC-BY-4.0",
                )
            )
    return pairs


def write_knowledge_base(folder: Path) -> Path:
    """A corpus and the library with its knowledge base in `folder`, as the demonstration's are laid out."""
    phrases = scene_phrases()
    write_corpus(folder / "corpus", make_pairs(), name="tiny", version=VERSION, facets=FACETS, scene_phrases=phrases)
    ensure_knowledge_base(folder, Lines(io.StringIO()))
    return folder


class Host:
    """An event loop on a thread, in which services run: gRPC's poller takes one loop of a process, not two."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @contextmanager
    def running(self, service: Service) -> Iterator[str]:
        """The address of a service while it runs."""
        started, stop = Future[str](), asyncio.Event()

        async def work() -> None:
            try:
                await serve(
                    service.settings,
                    opened=service.opened,
                    registry=service.registry,
                    admin_methods=service.admin_methods,
                    announce=started.set_result,
                    stop=stop,
                    health=service.health,
                )
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

        ended = asyncio.run_coroutine_threadsafe(work(), self._loop)
        address = started.result(START_TIMEOUT_S)
        try:
            yield address
        finally:
            self._loop.call_soon_threadsafe(stop.set)
            ended.result(START_TIMEOUT_S)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float = START_TIMEOUT_S) -> T:
        """What a coroutine gives in this loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)


@dataclass(frozen=True, kw_only=True)
class Service:
    """A service that is ready to be run by a host, and the registry of its metrics."""

    settings: ServerSettings
    opened: Opened
    registry: CollectorRegistry
    admin_methods: frozenset[str] = frozenset()
    health: Health | None = None

    def figure(self, name: str, **labels: object) -> float:
        """The value of a metric; 0 where it was never set."""
        value = self.registry.get_sample_value(name, {key: str(label) for key, label in labels.items()})
        return 0.0 if value is None else value


def retrieval_service(data: Path, socket: Path, **settings: Any) -> Service:
    """The retrieval service over the library in `data`."""
    given = RetrievalSettings(address=f"unix:{socket}", data=data, grace_s=1.0, **settings)
    registry = CollectorRegistry()
    opening = partial(retrieval_opened, given, registry)
    return Service(settings=given, opened=opening, registry=registry, admin_methods=ADMIN_METHODS)


def generator_service(socket: Path, **settings: Any) -> Service:
    """The generator."""
    given = GeneratorSettings(address=f"unix:{socket}", **({"grace_s": 1.0} | settings))
    registry = CollectorRegistry()
    health = Health()
    opening = partial(generator_opened, given, registry, health=health)
    return Service(settings=given, opened=opening, registry=registry, health=health)
