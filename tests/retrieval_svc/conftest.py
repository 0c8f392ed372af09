"""The small knowledge base, made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.knowledge_base import KnowledgeBase
from tests.retrieval_svc.small_pairs import FakeEmbedder, make_small


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the small knowledge base with embeddings, closed; not to be opened, only to be copied."""
    folder = tmp_path_factory.mktemp("knowledge-base") / "small"
    make_small(folder, embedder=FakeEmbedder()).close()
    return folder


@pytest.fixture(scope="session")
def knowledge_base(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBase]:
    """The small knowledge base with embeddings, opened in this process; not to be changed."""
    folder = tmp_path_factory.mktemp("opened") / "small"
    copy_folder(small_folder, folder)
    with closing(KnowledgeBase.open(folder, embedder=FakeEmbedder())) as opened:
        yield opened


@pytest.fixture
def changing(small_folder: Path, tmp_path: Path) -> Iterator[KnowledgeBase]:
    """The same, to be changed."""
    copy_folder(small_folder, tmp_path / "small")
    with closing(KnowledgeBase.open(tmp_path / "small", embedder=FakeEmbedder())) as opened:
        yield opened
