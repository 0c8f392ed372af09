"""A running stack for the tests of the client: the real services, with tiny weights and a tiny knowledge base."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.conftest import small_disk
from tests.generator_svc.conftest import (
    generator,
    host,
    knowledge_base,
    make_generator,
    retrieval_address,
    weights,
)
from tests.generator_svc.tiny_stack import Host, Service
from tests.trainer.conftest import corpus_folder, prepared_folder

__all__ = [
    "corpus_folder",
    "generator",
    "host",
    "knowledge_base",
    "make_generator",
    "prepared_folder",
    "retrieval_address",
    "small_disk",
    "weights",
]


@pytest.fixture(scope="session")
def generator_address(host: Host, generator: Service) -> Iterator[str]:
    """A running generator."""
    with host.running(generator) as address:
        yield address
