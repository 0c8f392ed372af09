"""Replicas over one Qdrant: what one writes, another shows. A stand-in takes the server's place; see `qdrant_stand_in.py`."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from retrieval_svc import pair_writer
from retrieval_svc.snapshot import restore
from tests.retrieval_svc.qdrant_stand_in import StandIn, serving
from tests.retrieval_svc.serving import (
    EMBEDDING_SIZE,
    TIMEOUT_S,
    Client,
    caught_up,
    fill,
    hosted,
    make_pairs,
    picture,
    refusal,
    spawned,
    vector,
)

BOTH = pytest.mark.parametrize("bm25", ["tantivy", "qdrant"])


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    with serving(stand_in) as reached:
        yield reached


@contextmanager
def replica(folder: Path, url: str, name: str, **settings: Any) -> Iterator[Client]:
    """A replica with a data folder of its own and pictures that all share."""
    given = {"qdrant_replication_factor": 1, "shared_pictures": folder / "pictures", **settings}
    with hosted(folder / name, qdrant_url=url, **given) as client:
        yield client


def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """What must happen within a second is given ten, for the machine may be busy."""
    deadline = time.monotonic() + within_s
    while True:
        with suppress(grpc.RpcError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def upsert(client: Client, *pairs: kb_pb.NewPair) -> None:
    client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base="small", pairs=pairs), timeout=TIMEOUT_S)


def delete(client: Client, *pair_ids: str) -> int:
    request = kb_pb.DeletePairsRequest(knowledge_base="small", pair_ids=pair_ids)
    return client.bases.DeletePairs(request, timeout=TIMEOUT_S).num_deleted


def new_pair(number: int, entity: str, **fields: Any) -> kb_pb.NewPair:
    return kb_pb.NewPair(
        pair_id=f"new-{number}", caption=entity, image=picture(100 + number), embedding=vector(100 + number), **fields
    )


def names(client: Client) -> list[str]:
    listed = client.bases.ListKnowledgeBases(kb_pb.ListKnowledgeBasesRequest(), timeout=TIMEOUT_S)
    return [base.name for base in listed.knowledge_bases]


def found(client: Client, prompt: str, **fields: Any) -> list[str]:
    return [neighbor.pair_id for neighbor in client.retrieve(prompt, **fields).neighbors]


@BOTH
def test_what_one_replica_changes_the_other_shows_stand_in(tmp_path: Path, url: str, bm25: str) -> None:
    with replica(tmp_path, url, "a", bm25=bm25) as a, replica(tmp_path, url, "b", bm25=bm25) as b:
        fill(a)
        until(lambda: names(b) == ["small"])
        until(lambda: found(b, "cat, noto style") == ["noto--cat", "twemoji--cat"])
        upsert(a, new_pair(0, "zeppelin", facets={"style": "engraved"}))
        until(lambda: found(b, "zeppelin") == ["new-0"])
        (neighbor,) = b.retrieve("zeppelin").neighbors
        assert neighbor.image == picture(100), "the picture that the other has stored"
        until(lambda: b.retrieve("zeppelin, engraved style").query.facets["style"] == "engraved")
        by_vector = {"method": pb.METHOD_CLIP, "query_embedding": vector(100)}
        assert found(b, "", k=1, **by_vector) == ["new-0"]

        upsert(b, new_pair(0, "airship"))  # replaced over there
        until(lambda: found(a, "airship") == ["new-0"])
        until(lambda: not found(a, "zeppelin"))
        assert delete(b, "new-0") == 1
        assert not found(b, "airship") and not found(a, "airship", omit_images=True), "at once, wherever it is asked"
        assert "new-0" not in found(a, "", k=10, **by_vector)
        assert len(_pictures(tmp_path)) == len(make_pairs()), "the deleted pair's pictures are gone"

        b.bases.DeleteKnowledgeBase(kb_pb.DeleteKnowledgeBaseRequest(name="small"), timeout=TIMEOUT_S)
        until(lambda: names(a) == [])
        until(lambda: not (tmp_path / "a" / "small").exists())
        assert not _pictures(tmp_path)


def _pictures(folder: Path) -> list[Path]:
    return [path for path in (folder / "pictures").rglob("*") if path.is_file() and len(path.name) == 62]


@BOTH
def test_a_replica_that_was_away_catches_up_stand_in(tmp_path: Path, url: str, bm25: str) -> None:
    with replica(tmp_path, url, "a", bm25=bm25) as a:
        fill(a)
        with replica(tmp_path, url, "b", bm25=bm25) as b:
            until(lambda: found(b, "cat"))
        upsert(a, new_pair(1, "zeppelin", facets={"style": "engraved"}))
        delete(a, "noto--cat")
        for name in ("b", "c"):  # one that knows how it was, and one that knows nothing
            with replica(tmp_path, url, name, bm25=bm25) as late:
                assert found(late, "zeppelin") == ["new-1"]
                assert found(late, "cat") == ["twemoji--cat"]
                assert late.retrieve("zeppelin, engraved style").query.facets["style"] == "engraved"


def test_a_replica_is_killed_and_comes_back_stand_in(tmp_path: Path, url: str) -> None:
    flags = ("--qdrant-url", url, "--qdrant-replication-factor", "1", "--shared-pictures", str(tmp_path / "pictures"))
    with spawned(tmp_path / "a", *flags) as a, spawned(tmp_path / "b", *flags) as b:
        fill(a)
        until(lambda: found(b, "cat"))
        a.process.send_signal(signal.SIGKILL)
        upsert(b, new_pair(1, "zeppelin"))
        delete(b, "noto--cat")
        with spawned(tmp_path / "a", *flags) as again:
            assert found(again, "zeppelin") == ["new-1"] and found(again, "cat") == ["twemoji--cat"]
            assert "index_rebuilt" not in again.log.read_text(), "it goes on from its cursor"


def test_a_knowledge_base_made_anew_is_another_stand_in(tmp_path: Path, url: str) -> None:
    with replica(tmp_path, url, "a") as a, replica(tmp_path, url, "b") as b:
        fill(a)
        until(lambda: found(b, "cat"))
        for client in (a, b):
            again = kb_pb.CreateKnowledgeBaseRequest(name="small", embedding_size=3)
            assert refusal(client.bases.CreateKnowledgeBase, again).code() is grpc.StatusCode.ALREADY_EXISTS
        a.bases.DeleteKnowledgeBase(kb_pb.DeleteKnowledgeBaseRequest(name="small"), timeout=TIMEOUT_S)
        fill(a, pairs=[new_pair(0, "zeppelin")])
        until(lambda: found(b, "zeppelin") == ["new-0"])
        until(lambda: not found(b, "cat"))


def test_without_its_server_a_replica_answers_from_its_index_stand_in(
    tmp_path: Path, stand_in: StandIn, url: str
) -> None:
    hybrid = {
        "method": pb.METHOD_HYBRID,
        "query_embedding": vector(0),
        "query_weights": pb.QueryWeights(embedding=1),
    }
    with replica(tmp_path, url, "a") as a:
        fill(a)
        caught_up(a)
        stand_in.faults = dict.fromkeys(("Query", "Get", "Scroll", "Count", "Upsert"), grpc.StatusCode.UNAVAILABLE)
        for fields in (hybrid, {}):
            answer = a.retrieve("cat", k=2, **fields)
            assert {neighbor.pair_id for neighbor in answer.neighbors} == {"noto--cat", "twemoji--cat"}
            assert [failed.leg for failed in answer.failed_legs] == [pb.METHOD_CLIP]
            assert "cannot be reached" in answer.failed_legs[0].reason
        change = kb_pb.UpsertPairsRequest(knowledge_base="small", pairs=[new_pair(1, "zeppelin")])
        assert refusal(a.bases.UpsertPairs, change).code() is grpc.StatusCode.UNAVAILABLE
        stand_in.faults = {}
        upsert(a, new_pair(1, "zeppelin"))
        until(lambda: found(a, "zeppelin") == ["new-1"])


def test_a_snapshot_of_a_server_opens_without_one_stand_in(tmp_path: Path, url: str) -> None:
    with replica(tmp_path, url, "a", snapshots=tmp_path / "snapshots") as a:
        fill(a)
        delete(a, "noto--cat")
        made = a.bases.CreateSnapshot(kb_pb.CreateSnapshotRequest(knowledge_base="small"), timeout=TIMEOUT_S)
        assert made.num_pairs == 9
    restore(Path(made.path), tmp_path / "library", "copy")
    with hosted(tmp_path / "library") as client:
        assert found(client, "cat") == ["twemoji--cat"]
        (neighbor,) = client.retrieve("cat").neighbors
        assert neighbor.image and neighbor.author == "author of twemoji"


def test_collections_that_are_not_ours_are_left_alone_stand_in(tmp_path: Path, stand_in: StandIn, url: str) -> None:
    stand_in.engine.create_collection("reimagen-theirs", vectors_config={})
    stand_in.engine.create_collection("theirs", vectors_config={})
    with replica(tmp_path, url, "a") as a:
        fill(a)
        assert names(a) == ["small"]
        theirs = pb.RetrieveRequest(prompt="cat", knowledge_base="theirs")
        until(lambda: refusal(a.retrieval.Retrieve, theirs).code() is grpc.StatusCode.FAILED_PRECONDITION)
        damaged = refusal(a.retrieval.Retrieve, theirs)
        assert damaged.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert stand_in.created["reimagen-small"].metadata["reimagen"].string_value
    assert stand_in.created["reimagen-small"].vectors_config.params_map.map["clip"].size == EMBEDDING_SIZE


def test_a_clock_that_is_ahead_hides_nothing_stand_in(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica's clock is an hour ahead of the other's, which replaces and deletes what it wrote."""
    with replica(tmp_path, url, "a") as a, replica(tmp_path, url, "b") as b:
        fill(a)
        until(lambda: found(b, "cat"))
        with monkeypatch.context() as ahead:
            ahead.setattr(pair_writer.time, "time_ns", lambda now=time.time_ns: now() + 3600 * 1_000_000_000)
            upsert(a, new_pair(0, "zeppelin"), new_pair(1, "balloon"))
        until(lambda: found(b, "zeppelin") and found(b, "balloon"))
        upsert(b, new_pair(0, "airship"))
        delete(b, "new-1")
        for client in (a, b):
            until(lambda client=client: found(client, "airship") == ["new-0"])
            assert not found(client, "zeppelin") and not found(client, "balloon")


@BOTH
def test_replicas_that_write_at_once_agree_in_the_end_stand_in(tmp_path: Path, url: str, bm25: str) -> None:
    """Both add, replace and delete the same pairs and pictures: they end with the same pairs, each with its picture."""

    def change(client: Client, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            number = rng.randrange(8)
            if rng.random() < 0.4:
                delete(client, f"new-{number}")
            else:
                upsert(client, new_pair(number, f"thing{number} made{rng.randrange(100)}"))

    def state(client: Client) -> list[tuple[str, str, int]]:
        answer = client.retrieve(" ".join(f"thing{number}" for number in range(8)), k=20)
        return sorted((n.pair_id, n.caption, len(n.image)) for n in answer.neighbors)

    with replica(tmp_path, url, "a", bm25=bm25) as a, replica(tmp_path, url, "b", bm25=bm25) as b:
        fill(a)
        until(lambda: found(b, "cat"))
        with ThreadPoolExecutor(4) as threads:
            for done in [threads.submit(change, client, seed) for seed, client in enumerate((a, b, a, b))]:
                done.result()
        listed = kb_pb.ListPairsRequest(knowledge_base="small", page_size=100)
        stored = [p for p in b.bases.ListPairs(listed, timeout=TIMEOUT_S).pairs if p.pair_id.startswith("new-")]
        expected = sorted((p.pair_id, p.caption, len(picture(100 + int(p.pair_id[4:])))) for p in stored)
        for client in (a, b):
            until(lambda client=client: state(client) == expected, within_s=30)
        images = {neighbor.image for client in (a, b) for neighbor in client.retrieve("thing1", k=1).neighbors}
        assert images <= {picture(101)}
        pictures = len(make_pairs()) + len(stored)
        assert len(_pictures(tmp_path)) == pictures, "none is missing, none is left over"
