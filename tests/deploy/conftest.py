"""Tiny weights and a tiny knowledge base for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.generator_svc.tiny_stack import write_knowledge_base, write_weights


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights of all stages."""
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of the demonstration's version, and its index."""
    return write_knowledge_base(tmp_path_factory.mktemp("work"))
