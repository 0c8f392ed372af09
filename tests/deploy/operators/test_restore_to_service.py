"""A snapshot into a service that runs: over real sockets, again where it is there, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from client.knowledge_base import KnowledgeBases
from client.retrieval_types import FacetSpec, KnowledgeBaseInfo, Pair, StoredPair
from deploy.operators.__main__ import main
from deploy.operators.restore_drill import served
from deploy.operators.restore_to_service import Restored, copy, make_alike

FACETS = (FacetSpec(name="style", template="{value} style", values=("noto", "twemoji"), alike={"noto": ("twemoji",)}),)
SCENES = ("on a white background",)


def pair(number: int) -> Pair:
    """One with everything that a pair may have."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
    return Pair(
        pair_id=f"pair/{number}",
        caption=f"a thing number {number}, noto style",
        image=picture.getvalue(),
        entity=f"number {number}",
        facets={"style": "noto"},
        author="somebody",
        source="somewhere",
        license="CC0-1.0",
        safe=True,
        attributes={"page": "7"},
        embedding=(0.6, 0.8, 0.0, 0.0),
    )


def whole(bases: KnowledgeBases, name: str) -> list[StoredPair]:
    """Every pair with its picture and embedding; versions are each knowledge base's own."""
    found = (bases.get(name, listed.pair_id, include_embedding=True) for listed in bases.list_pairs(name))
    return sorted((replace(each, version=0) for each in found), key=lambda each: each.pair_id)


def test_a_snapshot_goes_into_a_service_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path / "library", tmp_path / "snapshots", tmp_path) as bases:
        bases.create("saved", facets=FACETS, scene_phrases=SCENES, embedding_size=4)
        assert {said.outcome for said in bases.upsert("saved", map(pair, range(3)))} == {"created"}
        snapshot = tmp_path / "snapshots" / "saved" / str(bases.snapshot("saved").generation)
        asked = ["restore-to", str(snapshot), f"--retrieval=unix:{tmp_path}/retrieval.sock", "--knowledge-base"]
        assert main([*asked, "again"]) == 0
        assert "again: 3 created; 0 more" in capsys.readouterr().out
        (again,) = (base for base in bases.list() if base.name == "again")
        assert (again.facets, again.scene_phrases, again.embedding_size) == (FACETS, SCENES, 4)
        pairs = whole(bases, "saved")
        assert whole(bases, "again") == pairs and all(each.image and each.embedding for each in pairs)
        assert copy(bases, bases, "again") == Restored(outcomes={"unchanged": 3}, more=0), "it may be run again"
        with pytest.raises(ValueError, match=r"'again' has other scene_phrases there .*: delete it first"):
            make_alike(bases, replace(again, scene_phrases=()))
        make_alike(bases, replace(again, embedding_size=0))  # its CLIP model has embedded them


def test_embeddings_of_another_model_are_not_mixed() -> None:
    """A service with a CLIP model stands in."""
    service = Mock(spec=KnowledgeBases)
    service.list.return_value = []
    info = KnowledgeBaseInfo(
        name="dogs", facets=(), scene_phrases=(), embedding_size=4, embedding_model="ours", created_at=""
    )
    service.create.return_value = replace(info, embedding_model="theirs")
    with pytest.raises(ValueError, match=r"'dogs' has other embedding_model there than in the snapshot$"):
        make_alike(service, info)
    service.delete.assert_called_once_with("dogs")
    service.create.return_value = replace(info, embedding_model="")
    make_alike(service, info)
    service.delete.assert_called_once()


def test_what_is_no_snapshot_is_named_before_anybody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["restore-to", str(tmp_path), "--retrieval=127.0.0.1:1", "--knowledge-base=dogs"]
    assert main(asked) == 2
    assert main([*asked[:-1], "--knowledge-base=A B"]) == 2
    assert f"{tmp_path}/snapshot.json cannot be read" in capsys.readouterr().err
