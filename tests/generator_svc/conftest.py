"""Weights, a knowledge base and a running stack for the tests of generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.generator import GeneratorClient
from deploy.local.knowledge_base import LIBRARY
from tests.generator_svc.tiny_stack import (
    Host,
    Service,
    generator_service,
    retrieval_service,
    write_knowledge_base,
    write_weights,
)
from tests.generator_svc.triton_server import triton_repository, triton_server  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights of all stages."""
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def knowledge_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the library made of it."""
    return write_knowledge_base(tmp_path_factory.mktemp("knowledge-base"))


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """The event loop of all services."""
    running = Host()
    yield running
    running.close()


@pytest.fixture(scope="session")
def retrieval_address(host: Host, knowledge_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running retrieval service."""
    service = retrieval_service(knowledge_base / LIBRARY, tmp_path_factory.mktemp("r") / "retrieval.sock")
    with host.running(service) as address:
        yield address


@pytest.fixture(scope="session")
def make_generator(
    weights: Path, retrieval_address: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Service]:
    """Makes a generator with other settings."""

    def make(**settings: Any) -> Service:
        settings = {"weights": weights, "retrieval_address": retrieval_address} | settings
        return generator_service(tmp_path_factory.mktemp("g") / "generator.sock", **settings)

    return make


@pytest.fixture(scope="session")
def generator(make_generator: Callable[..., Service]) -> Service:
    """The generator that most tests ask."""
    return make_generator()


@pytest.fixture(scope="session")
def client(host: Host, generator: Service) -> Iterator[GeneratorClient]:
    """A client of the running generator."""
    with host.running(generator) as address, GeneratorClient(address) as connected:
        yield connected
