"""A small corpus with real pictures, its index, and the service as a process of its own on a Unix socket."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from PIL import Image
from reimagen.retrieval.v1 import retrieval_pb2_grpc

from common.corpus import Facet, Pair, write_corpus
from retrieval_svc.index_build import build_index
from retrieval_svc.knowledge_base import KnowledgeBase

ROOT = Path(__file__).parents[2]
STYLES = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat")
SCENE_PHRASES = ("on a white background", "on a blue background", "small in the top left corner")
START_TIMEOUT_S = 20


def make_picture(number: int) -> bytes:
    """A small PNG; another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 77)).save(stream, "PNG")
    return stream.getvalue()


def make_pairs() -> list[Pair]:
    """Entities in several styles; `cat` has the same picture in two of them."""
    drawn = {
        "guide dog": ("noto", "twemoji", "openmoji"),
        "dog": ("noto", "twemoji"),
        "hot dog": ("noto",),
        "blue circle": ("noto",),
        "blue heart": ("noto", "twemoji"),
        "blue book": ("noto",),
        "background picture": ("noto",),
        "old style house": ("noto", "openmoji"),
        "university": ("noto",),
        "universal remote": ("noto",),
        "1st place medal": ("noto", "twemoji"),
        "flag for cote divoire": ("noto", "twemoji"),
        "a button blood type": ("noto", "openmoji"),
        "cat": ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat"),
        "cat face": ("noto",),
    }
    pairs: list[Pair] = []
    for entity, styles in drawn.items():
        for style in styles:
            slug = entity.replace(" ", "-")
            same_as_noto = entity == "cat" and style == "noto-v1"
            pairs.append(
                Pair(
                    key=f"{style}--{slug}",
                    caption=f"{entity}, {style} style, on a white background",
                    image=make_picture(1000 if same_as_noto or (entity, style) == ("cat", "noto") else len(pairs)),
                    image_format="png",
                    entity=entity,
                    facets={"style": style},
                    author=f"author of {style}",
                    source="https://example.org",
                    license="CC-BY-4.0",
                )
            )
    captioned = "red panda, noto style, on a blue background"  # imported from elsewhere: a caption and nothing more
    pairs.append(Pair(key="captioned", caption=captioned, image=make_picture(2000), image_format="png"))
    return pairs


@pytest.fixture(scope="session")
def write_small_corpus() -> Callable[..., Path]:
    """Writes the small corpus, or other pairs, to a folder."""

    def write(folder: Path, pairs: list[Pair] | None = None, pairs_per_shard: int = 8) -> Path:
        write_corpus(
            folder,
            make_pairs() if pairs is None else pairs,
            name="small",
            version="1",
            facets=(Facet(name="style", template="{value} style", values=STYLES),),
            scene_phrases=SCENE_PHRASES,
            pairs_per_shard=pairs_per_shard,
        )
        return folder

    return write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_small_corpus: Callable[..., Path]) -> Path:
    """The small corpus."""
    return write_small_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Its index."""
    folder = tmp_path_factory.mktemp("index") / "index"
    assert build_index(corpus, folder, lambda done, total: None)
    return folder


@pytest.fixture(scope="session")
def knowledge_base(index: Path) -> Iterator[KnowledgeBase]:
    """The index, opened in this process."""
    opened = KnowledgeBase.open(index)
    yield opened
    opened.close()


@dataclass(frozen=True, kw_only=True)
class Service:
    """The service, running."""

    process: subprocess.Popen[str]
    address: str
    channel: grpc.Channel
    stub: retrieval_pb2_grpc.RetrievalServiceStub


def command_environment() -> dict[str, str]:
    """The environment of a command: this one's, with what is importable here importable there."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="session")
def run_retrieval() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m retrieval_svc ...` to its end."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "retrieval_svc", *map(str, arguments)]
        environment = command_environment() | dict(options.pop("environment", {}))  # type: ignore[call-overload]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def start_service(index: Path) -> Callable[..., AbstractContextManager[Service]]:
    """Starts the service as a process and waits until it says that it is ready; ends it after the block."""

    @contextmanager
    def start(address: str, *flags: str) -> Iterator[Service]:
        serve = ("-m", "retrieval_svc", "serve", "--address", address, "--index", str(index), *flags)
        # Its log goes to a file: a pipe that nobody reads would fill up and stop it.
        with tempfile.NamedTemporaryFile("r") as log, open(log.name, "w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *serve],
                cwd=ROOT,
                env=command_environment(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            try:
                assert process.stdout is not None
                said = process.stdout.readline().split()
                assert said[:1] == ["ready"], log.read()
                with grpc.insecure_channel(said[1]) as channel:
                    stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)
                    yield Service(process=process, address=said[1], channel=channel, stub=stub)
            finally:
                if process.poll() is None:
                    process.kill()
                process.communicate(timeout=START_TIMEOUT_S)

    return start


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, start_service: Callable[..., AbstractContextManager[Service]]
) -> Iterator[Service]:
    """One running service for the tests that only ask it."""
    with start_service(f"unix:{tmp_path_factory.mktemp('socket')}/retrieval.sock") as running:
        yield running
