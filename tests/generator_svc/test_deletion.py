"""A deleted pair shapes no later picture: generate, delete, generate, over both services."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.generator import Done, GenerationFailed, GenerationRequest, GeneratorClient, NeighborsFound, StageOverrides
from client.knowledge_base import KnowledgeBases, RetrievalFailed
from deploy.local.knowledge_base import LIBRARY, NAME
from tests.generator_svc.tiny_stack import Host, Service, retrieval_service

REQUEST = GenerationRequest(
    prompt="guide dog, noto style", k=2, seed=7, stop_at=64, stages=(StageOverrides(stage=64, steps=2),)
)
READ, ADMIN = "read-key-0123456789", "admin-key-0123456789"


def _draw(client: GeneratorClient) -> tuple[list[str], Any]:
    """Ids of the neighbors that were used, and the record."""
    events = list(client.generate(REQUEST, timeout_s=60.0))
    (found,) = (event for event in events if isinstance(event, NeighborsFound))
    (done,) = (event for event in events if isinstance(event, Done))
    return [neighbor.pair_id for neighbor in found.neighbors], done.record


def test_generate_delete_generate(
    host: Host, knowledge_base: Path, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    """With keys: the generator may read, and only an admin deletes."""
    shutil.copytree(knowledge_base / LIBRARY, tmp_path / "data")
    (tmp_path / "read").write_text(READ)
    (tmp_path / "admin").write_text(ADMIN)
    (tmp_path / "wrong").write_text("wrong-key-0123456789")
    keys = {"read_keys_file": tmp_path / "read", "admin_keys_file": tmp_path / "admin"}
    retrieval = retrieval_service(tmp_path / "data", tmp_path / "r.sock", **keys)
    with host.running(retrieval) as address, KnowledgeBases(address, api_key=ADMIN) as bases:
        generator = make_generator(retrieval_address=address, retrieval_api_key_file=tmp_path / "read")
        with host.running(generator) as reached, GeneratorClient(reached) as client:
            used, _ = _draw(client)
            assert used[0] == "noto--guide-dog"
            image = bases.get(NAME, used[0]).image_sha256
            with KnowledgeBases(address, api_key=READ) as reader, pytest.raises(RetrievalFailed, match="may read"):
                reader.delete_pairs(NAME, used[:1])
            assert bases.delete_pairs(NAME, used[:1]) == 1
            for _ in range(3):
                later, record = _draw(client)
                assert later and used[0] not in later
                assert used[0] not in str(record) and image not in str(record)
        stranger = make_generator(retrieval_address=address, retrieval_api_key_file=tmp_path / "wrong")
        with host.running(stranger) as reached, GeneratorClient(reached) as client:
            with pytest.raises(GenerationFailed, match="refuses this service's API key") as caught:
                _draw(client)
            assert caught.value.code == "FAILED_PRECONDITION"
    assert not list((tmp_path / "data" / NAME / "images").rglob(f"*{image[2:]}*")), "nor is the picture kept"
