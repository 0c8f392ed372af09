"""KNN-ImageText, of a real retrieval service over a real socket: shards, interruptions, merging, what training reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb

from common.corpus import Pair, read_manifest, write_corpus
from tests.retrieval_svc.serving import Client, caught_up, hosted
from tests.trainer.shapes import STYLES, shape_pairs, write_shapes
from trainer import knn, knn_lookup
from trainer.__main__ import main
from trainer.knn import CANDIDATES, ask_shard, asked_of, iter_rows, write_neighbors
from trainer.knn_lookup import LookupFailed, Service
from trainer.knn_shards import Asked, Header, ShardError, read_header

ROOT = Path(__file__).parents[2]


def library_pairs() -> list[Pair]:
    """The shapes; of one entity there is a second pair with the very picture of the first."""
    pairs = shape_pairs()
    return [*pairs, replace(pairs[0], key="twin", caption="red circle", facets={})]


def store(client: Client, name: str, pairs: list[Pair]) -> None:
    """Make a knowledge base of a corpus' pairs, as `retrieval_svc import` does."""
    facet = kb_pb.Facet(name="style", template="{value} style", values=tuple(STYLES))
    create = kb_pb.CreateKnowledgeBaseRequest(name=name, facets=[facet], scene_phrases=["on a white background"])
    while True:
        try:
            client.bases.CreateKnowledgeBase(create, timeout=20)
            break
        except grpc.RpcError as error:  # a CLIP model is loading
            said: Any = error
            assert said.code() is grpc.StatusCode.UNAVAILABLE and said.details().endswith("is loading"), said.details()
            time.sleep(0.2)
    if pairs:
        upsert(client, name, pairs)


def upsert(client: Client, name: str, pairs: list[Pair]) -> None:
    """Store pairs and wait until they are found."""
    stored = [
        kb_pb.NewPair(
            pair_id=p.key,
            caption=p.caption,
            entity=p.entity,
            image=p.image,
            facets=dict(p.facets),
            attributes={"held_out": "true"} if p.held_out else {},
        )
        for p in pairs
    ]
    client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base=name, pairs=stored), timeout=20)
    caught_up(client, name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two tars, so that a shard ends within one."""
    folder = tmp_path_factory.mktemp("library") / "corpus"
    write_corpus(folder, library_pairs(), name="shapes", version="1", pairs_per_shard=14)
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with hosted(tmp_path_factory.mktemp("library") / "data") as client:
        store(client, "shapes", library_pairs())
        yield client


def silent(*told: Any) -> None:
    """A progress that nobody sees."""


def question(corpus: Path, **changed: Any) -> Asked:
    given: dict[str, Any] = {"knowledge_base": "shapes", "method": "bm25", "k": CANDIDATES, "num_shards": 1}
    return asked_of(corpus, **(given | changed))


def lookups(client: Client) -> float:
    """How many the service has answered."""
    name = "reimagen_retrieval_requests_total"
    return sum(client.figure(name, leg="bm25", outcome=outcome) for outcome in ("ok", "shortfall"))


def settled(client: Client) -> float:
    """The same, once those are counted that were under way when their caller left."""
    before, now = -1.0, lookups(client)
    while now != before:
        time.sleep(0.3)
        before, now = now, lookups(client)
    return now


def test_neighbors(client: Client, corpus: Path, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    service, asked = Service(address=client.address), question(corpus)
    path = write_neighbors(corpus, tmp_path, service, asked, lambda *told: progress.append(told))
    assert path == tmp_path / "knn" / f"{read_manifest(corpus).fingerprint}.npy"
    nearest, pairs = np.load(path), library_pairs()
    assert nearest.shape == (25, CANDIDATES) and nearest.dtype == np.int32
    for i, pair in enumerate(pairs):
        rows = [int(j) for j in nearest[i] if j >= 0]
        found = [pairs[j] for j in rows]
        assert rows and i not in rows and len(set(rows)) == len(rows)
        assert [j >= 0 for j in nearest[i]] == sorted((j >= 0 for j in nearest[i]), reverse=True), "gaps at the end"
        assert all(p.image != pair.image for p in found), "neither the pair nor its twin"
        assert all(p.entity == pair.entity for p in found[:2])
        assert all(set(p.entity.split()) & set(pair.entity.split()) for p in found)
        if not pair.held_out:
            assert not any(p.held_out for p in found), "training never sees a held-out picture"
    assert any(pairs[j].held_out for i, p in enumerate(pairs) if p.held_out for j in nearest[i] if j >= 0)
    assert progress[-1] == ("neighbors, shard 0", 25, 25)
    before = lookups(client)
    assert write_neighbors(corpus, tmp_path, Service(address="unix:/nowhere"), asked, silent) == path
    assert lookups(client) == before, "what is there is kept"


def test_the_question_decides_what_is_kept(client: Client, corpus: Path, tmp_path: Path) -> None:
    service = Service(address=client.address)
    write_neighbors(corpus, tmp_path, service, question(corpus), silent)
    path = write_neighbors(corpus, tmp_path, service, question(corpus, k=2), silent)
    assert np.load(path).shape == (25, 2)
    assert json.loads(path.with_suffix(".json").read_text())["asked"]["k"] == 2
    path.with_suffix(".json").write_text("{")
    assert np.load(write_neighbors(corpus, tmp_path, service, question(corpus), silent)).shape == (25, CANDIDATES)


def test_shards_of_many_workers_are_the_whole(
    client: Client, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_neighbors(corpus, tmp_path / "whole", Service(address=client.address), question(corpus, k=2), silent)
    data = tmp_path / "data"
    flags = ["knn", "--corpus", str(corpus), "--data", str(data), "--knowledge-base", "shapes", "--k", "2"]
    asking = [*flags, "--shards", "3", "--retrieval", client.address]
    for shard in (2, 0):  # each as a pod of an indexed Job
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(shard))
        assert main(asking) == 0
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    capsys.readouterr()
    assert main([*flags, "--shards", "3", "--merge"]) == 2
    assert "shards 1 of 3 are not there" in capsys.readouterr().err
    assert main([*asking, "--shard", "1"]) == 0 and main([*flags, "--shards", "3", "--merge"]) == 0
    assert (np.load(data / "knn" / whole.name) == np.load(whole)).all()
    assert main([*asking, "--shard", "3"]) == 2
    assert "shard: 3 is not between 0 and 2" in capsys.readouterr().err


def test_an_interrupted_shard_goes_on(
    client: Client, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "PART_PAIRS", 4)
    service, asked = Service(address=client.address), question(corpus, num_shards=2)

    def interrupt(task: str, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_shard(corpus, tmp_path, service, asked, 1, interrupt)
    assert not list(tmp_path.rglob("shard-*.safetensors"))
    before = lookups(client)
    path = ask_shard(corpus, tmp_path, service, asked, 1, silent)
    assert lookups(client) - before == len(asked.rows(1)) - 8 + 1, "and one lookup to know the index"
    whole = ask_shard(corpus, tmp_path / "again", service, asked, 1, silent)
    assert _arrays(path) == _arrays(whole) and not list(tmp_path.rglob("parts-*"))
    before = lookups(client)
    ask_shard(corpus, tmp_path, service, asked, 1, silent)
    assert lookups(client) - before == 1, "a finished shard is kept"


def _arrays(path: Path) -> bytes:
    """The file without what it says of itself."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_worker_that_was_killed_goes_on(client: Client, corpus: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom trainer import knn\nknn.PART_PAIRS = 4\n"
        "from trainer.knn_lookup import Service\n"
        "asked = knn.asked_of(Path(sys.argv[1]), knowledge_base='shapes', method='bm25', k=2, num_shards=1)\n"
        "kill = lambda task, done, total: done == 12 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "knn.write_neighbors(Path(sys.argv[1]), Path(sys.argv[2]), Service(address=sys.argv[3]), asked, kill)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path), client.address]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60).returncode == -9
    before = lookups(client)
    path = write_neighbors(corpus, tmp_path, Service(address=client.address), question(corpus, k=2), silent)
    assert lookups(client) - before == 25 - 12 + 1
    assert np.load(path).shape == (25, 2)


def test_a_knowledge_base_that_changes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "PART_PAIRS", 4)
    with hosted(tmp_path / "data") as client:
        store(client, "shapes", shape_pairs())
        service, asked = Service(address=client.address), question(corpus, k=2, num_shards=2)
        ask_shard(corpus, tmp_path, service, asked, 0, silent)

        def change(task: str, done: int, total: int) -> None:
            if done == 4:
                upsert(client, "shapes", library_pairs()[-1:])

        with pytest.raises(LookupFailed, match="'shapes' changed while it was asked"):
            ask_shard(corpus, tmp_path, service, asked, 1, change)
        before = settled(client)
        ask_shard(corpus, tmp_path, service, asked, 1, silent)
        assert lookups(client) - before == len(asked.rows(1)) + 1, "the part of the older index is not kept"
        with pytest.raises(ShardError, match=r"changed between shards .*: shards 0; .*: shards 1"):
            write_without_asking(corpus, tmp_path, asked)
        assert write_neighbors(corpus, tmp_path, service, asked, silent).is_file(), "the older shard was asked again"


def write_without_asking(corpus: Path, folder: Path, asked: Asked) -> None:
    knn.merge(folder, asked, lambda rows: knn.names_of(corpus, rows))


def test_shards_that_do_not_belong_together(client: Client, corpus: Path, tmp_path: Path) -> None:
    service, asked = Service(address=client.address), question(corpus, k=2, num_shards=2)
    first, second = (ask_shard(corpus, tmp_path, service, asked, shard, silent) for shard in range(2))
    kept = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(ShardError, match="holds pairs 0 to 12, not range"):
        write_without_asking(corpus, tmp_path, asked)
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ShardError, match=r"shard-00001\.safetensors is damaged"):
        write_without_asking(corpus, tmp_path, asked)
    other = ask_shard(corpus, tmp_path, service, replace(asked, k=3), 1, silent)
    shutil.copy(other, second)
    with pytest.raises(ShardError, match="answers another question"):
        write_without_asking(corpus, tmp_path, asked)
    assert not list((tmp_path / "knn").glob("*.npy"))
    assert isinstance(read_header(first), Header) and read_header(first).last == 12


def test_another_corpus_is_told_apart(client: Client, tmp_path: Path) -> None:
    strangers = [replace(p, key=f"stranger-{i}", image=p.image + b" ") for i, p in enumerate(shape_pairs())]
    write_shapes(tmp_path / "corpus", strangers)
    with pytest.raises(ShardError, match="none of the neighbors is of this corpus"):
        write_neighbors(
            tmp_path / "corpus", tmp_path, Service(address=client.address), question(tmp_path / "corpus"), silent
        )
    assert not list((tmp_path / "knn").glob("*.*"))


def test_captions_that_are_no_question_have_no_neighbors(client: Client, tmp_path: Path) -> None:
    pairs = shape_pairs()
    pairs[3] = replace(pairs[3], caption="blue circle, vaporwave style")
    write_shapes(tmp_path / "corpus", pairs)
    asked = question(tmp_path / "corpus")
    path = write_neighbors(tmp_path / "corpus", tmp_path, Service(address=client.address), asked, silent)
    nearest, said = np.load(path), json.loads(path.with_suffix(".json").read_text())["statistics"]
    assert (nearest[3] == -1).all() and (nearest[4] >= 0).any()
    assert said["refused_captions"] == 1 and "vaporwave" in said["refused_examples"][pairs[3].key]
    assert said["share_without_neighbors"] == round(1 / 24, 5)


def test_failures_are_told(client: Client, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_lookup, "FIRST_PATIENCE_S", 0.3)
    service = Service(address=client.address)
    with pytest.raises(LookupFailed, match=r"unix:.*nobody does not answer: UNAVAILABLE"):
        write_neighbors(corpus, tmp_path, Service(address=f"unix:{tmp_path}/nobody"), question(corpus), silent)
    with pytest.raises(LookupFailed, match="no CLIP index"):
        write_neighbors(corpus, tmp_path, service, question(corpus, method="clip"), silent)
    with pytest.raises(LookupFailed, match="'strangers'"):
        write_neighbors(corpus, tmp_path, service, question(corpus, knowledge_base="strangers"), silent)
    for wrong, field in (({"k": 0}, "k: 0"), ({"k": 33}, "k: 33"), ({"num_shards": 26}, "shards: 26")):
        with pytest.raises(ValueError, match=field):
            question(corpus, **wrong)
    assert not list((tmp_path / "knn").glob("*.npy"))


def test_a_service_that_comes_back_is_waited_for(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "PART_PAIRS", 8)
    address = f"unix:{tmp_path}/r.sock"
    running = hosted(tmp_path / "data", address=address)
    client = running.__enter__()
    store(client, "shapes", library_pairs())
    again: list[Any] = []

    def restart(task: str, done: int, total: int) -> None:
        if done == 8:
            running.__exit__(None, None, None)
            again.append(hosted(tmp_path / "data", address=address))
            again[0].__enter__()

    path = write_neighbors(corpus, tmp_path, Service(address=address), question(corpus), restart)
    again[0].__exit__(None, None, None)
    assert (np.load(path) >= 0).any(1).all()


def test_rows_of_a_corpus(corpus: Path) -> None:
    keys = [p.key for p in library_pairs()]
    assert [p.key for p in iter_rows(corpus, range(25))] == keys
    assert [p.key for p in iter_rows(corpus, range(11, 17))] == keys[11:17]
    assert not list(iter_rows(corpus, range(25, 25)))
