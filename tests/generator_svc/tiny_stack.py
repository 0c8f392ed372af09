"""A cascade that draws noise in a second, a corpus of coloured squares, and both services on Unix sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from common.checkpoint import publish_stage
from common.corpus import Facet, Pair, write_corpus
from common.scenes import Scene, caption, scene_phrases
from common.service.server import Opened, ServerSettings, serve
from common.unet.config import UNetConfig
from common.unet.unet import UNet
from generator_svc.__main__ import GeneratorSettings
from generator_svc.__main__ import opened as generator_opened
from retrieval_svc.__main__ import RetrievalSettings
from retrieval_svc.__main__ import _opened as retrieval_opened
from retrieval_svc.iconify import VERSION
from retrieval_svc.index_build import build_index

STYLES = ("noto", "twemoji", "openmoji")
ENTITIES = ("guide dog", "red apple", "steam locomotive", "old oak tree")
START_TIMEOUT_S = 60.0

TINY_64 = UNetConfig(
    patch=4,
    widths=(8, 16),
    blocks=(1, 1),
    attention=(False, True),
    neighbor_attention=(True, True),
    head_width=8,
    text_width=384,
    embedding_width=16,
    scale=1,
)
TINY_256 = replace(TINY_64, patch=8, attention=(False, False), neighbor_attention=(False, False), text_width=0, scale=4)
TINY_UNETS = {64: TINY_64, 256: TINY_256, 1024: replace(TINY_256, patch=32)}


def tiny_unet(size: int) -> UNet:
    """A U-Net with weights that are far enough from zero for every input to matter; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(size)
        unet = UNet(TINY_UNETS[size])
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return unet.eval().requires_grad_(False)


def write_weights(folder: Path) -> Path:
    """Weights of all three stages."""
    for size, config in TINY_UNETS.items():
        publish_stage(folder, size, config, tiny_unet(size).state_dict(), {"examples": 0})
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
    """A corpus and its index in `folder`, as the demonstration's are laid out."""
    write_corpus(
        folder / "corpus",
        make_pairs(),
        name="tiny",
        version=VERSION,
        facets=(Facet(name="style", template="{value} style", values=STYLES),),
        scene_phrases=scene_phrases(),
    )
    build_index(folder / "corpus", folder / "index", lambda done, total: None)
    return folder


@dataclass(kw_only=True)
class Service:
    """A service that runs in an event loop of its own, on a thread."""

    settings: ServerSettings
    opened: Opened
    registry: CollectorRegistry
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator[str]:
        """The address of the service while it runs."""
        loop, stop = asyncio.new_event_loop(), asyncio.Event()

        def work() -> None:
            try:
                loop.run_until_complete(
                    serve(
                        self.settings,
                        opened=self.opened,
                        registry=self.registry,
                        announce=lambda address: self.ready.set(),
                        stop=stop,
                    )
                )
            except BaseException as error:
                self.error = error
            finally:
                self.ready.set()
                loop.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert self.ready.wait(START_TIMEOUT_S), "the service did not start"
        if self.error is not None:
            raise self.error
        try:
            yield self.settings.address
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(START_TIMEOUT_S)


def retrieval_service(index: Path, socket: Path) -> Service:
    """The retrieval service over `index`."""
    settings = RetrievalSettings(address=f"unix:{socket}", index=index, grace_s=1.0)
    registry = CollectorRegistry()
    return Service(settings=settings, opened=partial(retrieval_opened, settings, registry), registry=registry)


def generator_service(weights: Path, retrieval_address: str, socket: Path, **settings: object) -> Service:
    """The generator with tiny weights."""
    given = GeneratorSettings(
        address=f"unix:{socket}",
        weights=weights,
        retrieval_address=retrieval_address,
        grace_s=1.0,
        **settings,  # pyright: ignore[reportArgumentType]
    )
    registry = CollectorRegistry()
    return Service(settings=given, opened=partial(generator_opened, given, registry), registry=registry)
