"""A knowledge base as a corpus: every way in is a way to training; and what CLIP says of it, by the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb

from client.knowledge_base import KnowledgeBases
from common.corpus import iter_pairs, read_manifest
from retrieval_svc.__main__ import main as retrieval
from tests.retrieval_svc.serving import Client, hosted
from tests.trainer.shapes import LetterEncoder, shape_pairs
from tests.trainer.test_knn import silent, store
from trainer.__main__ import main
from trainer.dataset import open_prepared, prepare
from trainer.knn_corpus import corpus_key, corpus_of_knowledge_base
from trainer.knn_shards import retrieval_id


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The shapes, as they came from a corpus; a folder of pictures, imported; and a base that holds addresses alone."""
    folder = tmp_path_factory.mktemp("library")
    pictures = folder / "pictures"
    (pictures / "cats").mkdir(parents=True)
    lines = []
    for number, pair in enumerate(shape_pairs()):
        name = f"cats/picture.{number}.svg"
        (pictures / name).write_bytes(pair.image)
        lines.append(json.dumps({"file_name": name, "text": f"a photo of a {pair.entity}", "license": "CC0-1.0"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    command = ["import", str(pictures), "--knowledge-base", "pictures", "--data", str(folder / "data")]
    assert retrieval(command) == 0
    with hosted(folder / "data") as client:
        store(client, "shapes", shape_pairs())
        store(client, "addresses", [])
        pair = kb_pb.NewPair(pair_id="far", caption="a far cat", image_uri="https://example.org/cat.png")
        client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base="addresses", pairs=[pair]), timeout=20)
        yield client


def test_a_corpus_comes_back_as_it_was(client: Client, tmp_path: Path) -> None:
    with KnowledgeBases(client.address) as bases:
        manifest = corpus_of_knowledge_base(bases, "shapes", tmp_path / "c", hold_out=False, progress=silent)
    assert manifest.num_pairs == 24 and manifest.facets[0].name == "style"
    assert manifest.scene_phrases == ("on a white background",)
    given = {p.key: replace(p, extra={}) for p in shape_pairs()}
    assert {p.key: p for p in iter_pairs(tmp_path / "c")} == given


def test_imported_pictures_are_prepared_and_have_neighbors(client: Client, tmp_path: Path) -> None:
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    command = ["--retrieval", client.address, "--knowledge-base", "pictures", "--corpus", str(corpus)]
    assert main(["corpus", *command, "--hold-out"]) == 0
    pairs = list(iter_pairs(corpus))
    assert len(pairs) == 24 and all(p.license == "CC0-1.0" for p in pairs)
    assert all("." in p.extra["pair_id"] and "." not in p.key for p in pairs), "its own id is kept beside the key"
    assert 0 < sum(p.held_out for p in pairs) < 24
    assert main(["knn", *command, "--k", "2", "--data", str(data)]) == 0
    prepare(corpus, data, LetterEncoder, silent)  # type: ignore[arg-type]
    prepared = open_prepared(data)
    assert prepared.fingerprint == read_manifest(corpus).fingerprint
    assert prepared.neighbors.shape == (24, 2)
    for i, row in enumerate(prepared.neighbors):
        shape = pairs[i].caption.split()[-1]
        assert all(pairs[j].caption.split()[-1] == shape for j in row[:1] if j >= 0)
        assert i not in row


def test_what_cannot_be_a_corpus_is_told(client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["corpus", "--retrieval", client.address, "--corpus", str(tmp_path / "c"), "--knowledge-base"]
    assert main([*command, "addresses"]) == 2
    assert "addresses holds no pair with a picture" in capsys.readouterr().err
    assert main([*command, "strangers"]) == 2
    assert "NOT_FOUND" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "dog.png").write_bytes(b"a picture that nobody else has")
    assert main([*command, "shapes"]) == 2
    assert f"corpus: {tmp_path / 'c'} holds something else than a corpus" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*.*")] == ["dog.png"]


def test_an_attribute_of_the_name_pair_id_is_no_id(client: Client, tmp_path: Path) -> None:
    """It would be asked with, and be left out of its own neighbors, as another pair."""
    client.bases.CreateKnowledgeBase(kb_pb.CreateKnowledgeBaseRequest(name="named"), timeout=20)
    image = shape_pairs()[0].image
    for pair_id in ("cat", "a/cat.svg"):
        pair = kb_pb.NewPair(pair_id=pair_id, caption="a cat", image=image, attributes={"pair_id": "dog", "tone": "x"})
        client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base="named", pairs=[pair]), timeout=20)
    with KnowledgeBases(client.address) as bases:
        corpus_of_knowledge_base(bases, "named", tmp_path / "c", hold_out=False, progress=silent)
    found = {retrieval_id(p): p.extra for p in iter_pairs(tmp_path / "c")}
    assert found == {"cat": {"tone": "x"}, "a/cat.svg": {"tone": "x", "pair_id": "a/cat.svg"}}


def test_a_corpus_may_call_anything_pair_id() -> None:
    pair = replace(shape_pairs()[0], extra={"pair_id": "dog"})
    assert retrieval_id(pair) == pair.key


def test_keys() -> None:
    assert corpus_key("noto--guide-dog") == "noto--guide-dog"
    odd = ["a/b.png", "a/b-png", "x" * 96, "dots.", "über" * 40]
    keys = [corpus_key(name) for name in odd]
    assert len(set(keys)) == len(odd)
    assert all(len(k.encode()) <= 95 and "." not in k and "/" not in k for k in keys)


@pytest.mark.parametrize("method", ["clip", "hybrid"])
def test_neighbors_by_clip(method: str, tmp_path_factory: pytest.TempPathFactory, clip: Client) -> None:
    folder = tmp_path_factory.mktemp(method)
    flags = ["--retrieval", clip.address, "--knowledge-base", "shapes"]
    assert main(["corpus", *flags, "--corpus", str(folder / "corpus")]) == 0
    asking = ["knn", *flags, "--corpus", str(folder / "corpus"), "--data", str(folder), "--k", "2"]
    assert main([*asking, "--method", method]) == 0
    nearest = np.load(folder / "knn" / f"{read_manifest(folder / 'corpus').fingerprint}.npy")
    trained = [i for i, p in enumerate(iter_pairs(folder / "corpus")) if not p.held_out]
    assert (nearest[trained] >= 0).all(), "CLIP always finds some"
    assert all(i not in row for i, row in enumerate(nearest))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The shapes, embedded by the packaged dual encoder."""
    with hosted(tmp_path_factory.mktemp("clip") / "data", clip="packaged") as client:
        store(client, "shapes", shape_pairs())
        yield client
