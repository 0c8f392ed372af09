"""The store on this machine: durable, alone in its folder, searched while it is written to, copied, built anew."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.service.errors import DataLoss, FailedPrecondition
from retrieval_svc import edge_shard
from retrieval_svc.edge_shard import VectorSettings, copy_folder
from retrieval_svc.pairs import PairFilter
from retrieval_svc.vectors import EdgePairStore
from tests.retrieval_svc.stores import NOW, SIZE, SMALL, copy_of, make_blank, pair, vectors

ROOT = Path(__file__).parents[2]
ALL = PairFilter()


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blank(tmp_path_factory.mktemp("blank") / "pairs")


@pytest.fixture
def store(blank: Path, tmp_path: Path) -> Iterator[EdgePairStore]:
    opened = copy_of(blank, tmp_path / "pairs")
    yield opened
    opened.close()


def filled(store: EdgePairStore, count: int) -> EdgePairStore:
    store.upsert([pair(number) for number in range(count)], vectors(count))
    return store


def test_what_was_closed_is_there_when_opened(store: EdgePairStore, tmp_path: Path) -> None:
    filled(store, 10).delete(["pair/3"], NOW + 50)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.count()
    again = EdgePairStore.open(tmp_path / "pairs")
    assert (again.embedding_size, again.count(), again.latest_version()) == (SIZE, 9, NOW + 50)
    again.close()


def test_killed_at_any_point_nothing_that_was_promised_is_lost(blank: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    copy_folder(blank, folder)
    promised = 0
    for round_number in range(2):
        command = [sys.executable, "-m", "tests.retrieval_svc.edge_writer", str(folder)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(3 + 20 * round_number):
                start, promised = (int(word) for word in writer.stdout.readline().split())
            writer.kill()
        store = EdgePairStore.open(folder)
        found = store.get([f"pair/{number}" for number in range(promised)], with_embeddings=True)
        assert {f"pair/{number}" for number in range(start, promised - 1)} <= set(found)
        assert f"pair/{start - 1}" not in found
        assert all(hit.embedding is not None for hit in found.values())
        assert len(store.nearest(vectors(1)[0], limit=9999, filter=ALL, exact=True)) == store.count()
        store.close()


def test_the_log_alone_brings_back_what_was_promised(store: EdgePairStore, tmp_path: Path) -> None:
    """As after a power failure: the segments as they were when they were last synced, the log as it was synced since."""
    filled(store, 5)
    store.snapshot(tmp_path / "synced")
    store.upsert([pair(number) for number in range(5, 25)], vectors(20, seed=1))
    store.delete(["pair/0"], NOW + 99)
    shutil.rmtree(tmp_path / "synced" / "shard-1" / "wal")
    copy_folder(tmp_path / "pairs" / "shard-1" / "wal", tmp_path / "synced" / "shard-1" / "wal")
    after = EdgePairStore.open(tmp_path / "synced")
    assert after.get(["pair/0"]) == {}
    assert (after.count(), after.count(with_embedding=True), after.latest_version()) == (24, 24, NOW + 99)
    after.close()


def test_the_log_is_synced_before_a_write_returns(store: EdgePairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    filled(store, 1)
    log = set((store._folder / "shard-1" / "wal").iterdir())
    assert {str(path) for path in log} <= set(synced)
    synced.clear()
    store.delete(["pair/0"], NOW + 9)
    assert {str(path) for path in log} <= set(synced)


def test_a_folder_is_open_once(store: EdgePairStore, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="open already"):
        EdgePairStore.open(tmp_path / "pairs")
    command = [sys.executable, "-m", "tests.retrieval_svc.edge_writer", str(tmp_path / "pairs")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "open already, here or in another process" in other.stderr
    filled(store, 1)
    assert store.count() == 1


def test_damage_is_told_and_names_the_folder(blank: Path, tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match=r"store\.json cannot be read"):
        EdgePairStore.open(tmp_path)
    copy_folder(blank, tmp_path / "pairs")
    (tmp_path / "pairs" / "store.json").write_text('{"format": "reimagen-pairs/9"}')
    with pytest.raises(DataLoss, match="reimagen-pairs/9"):
        EdgePairStore.open(tmp_path / "pairs")
    copy_folder(blank, tmp_path / "torn")
    for path in (tmp_path / "torn" / "shard-1" / "segments").rglob("segment.json"):
        path.write_text("{")
    with pytest.raises(DataLoss, match="shard-1 cannot be opened"):
        EdgePairStore.open(tmp_path / "torn")


def test_creating_asks_for_an_empty_folder_and_a_size(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="is not empty"):
        EdgePairStore.create(tmp_path, embedding_size=4)
    with pytest.raises(ValueError, match="embedding_size -1"):
        EdgePairStore.create(tmp_path / "new", embedding_size=-1)


def test_a_store_without_embeddings(tmp_path: Path) -> None:
    store = EdgePairStore.create(tmp_path / "pairs", embedding_size=0)
    store.upsert([pair(0)], [None])
    assert (store.embedding_size, store.count(), store.count(with_embedding=True)) == (0, 1, 0)
    with pytest.raises(ValueError, match="size 0"):
        store.upsert([pair(1)], vectors(1))
    store.close()


def test_writing_stops_before_the_disk_is_full(blank: Path, tmp_path: Path) -> None:
    copy_folder(blank, tmp_path / "pairs")
    settings = replace(SMALL, reserve_bytes=1 << 60)
    store = EdgePairStore.open(tmp_path / "pairs", settings=settings)
    with pytest.raises(OSError, match="must be in reserve") as refused:
        filled(store, 1)
    assert refused.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="must be in reserve"):
        store.optimize()
    assert store.count() == 0
    store.close()


def test_a_snapshot_is_a_store_of_its_own(store: EdgePairStore, tmp_path: Path) -> None:
    filled(store, 10)
    store.snapshot(tmp_path / "copy")
    store.delete(["pair/1"], NOW + 50)
    filled(store, 1)
    copy = EdgePairStore.open(tmp_path / "copy")
    assert (copy.count(), copy.latest_version(), copy.embedding_size) == (10, NOW + 9, SIZE)
    query = vectors(10)[4]
    assert copy.nearest(query, limit=1, filter=ALL)[0].pair == pair(4)
    copy.close()
    with pytest.raises(ValueError, match="is not empty"):
        store.snapshot(tmp_path / "copy")
    used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "copy").rglob("*"))
    assert used < 8 << 20, "files that the engine sets up in advance are copied with their holes"


def test_reading_and_writing_go_on_while_the_graph_is_built(store: EdgePairStore, tmp_path: Path) -> None:
    count = 600
    embeddings = vectors(count)
    store.upsert([pair(number) for number in range(count)], embeddings)
    store.delete(["pair/0"], NOW + count)
    is_over, errors, num_reads = threading.Event(), [], [0]

    def read() -> None:
        while not is_over.is_set():
            try:
                assert len(store.nearest(embeddings[num_reads[0] % count], limit=5, filter=ALL)) == 5
                assert "pair/7" in store.get(["pair/7"])
                num_reads[0] += 1
            except BaseException as error:
                errors.append(error)
                return
            is_over.wait(0.01)

    builder = threading.Thread(target=store.optimize)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (builder, *readers):
        thread.start()
    written = count
    while builder.is_alive() and written < count + 200:
        store.upsert([pair(written, version=NOW + 2 * written)], vectors(1, seed=written))
        store.delete([f"pair/{written - count + 10}"], NOW + 2 * written + 1)
        written += 1
        builder.join(0.02)
    builder.join()
    is_over.set()
    for thread in readers:
        thread.join()
    assert not errors and num_reads[0] > 0
    assert [path.name for path in (tmp_path / "pairs").glob("shard-*")] == ["shard-2"]
    gone = {f"pair/{number}" for number in (0, *range(10, written - count + 10))}
    expected = {f"pair/{number}" for number in range(written)} - gone
    assert set(store.get([f"pair/{number}" for number in range(written)])) == expected
    assert store.latest_version() == NOW + 2 * (written - 1) + 1
    exact = [hit.pair.pair_id for hit in store.nearest(embeddings[3], limit=10, filter=ALL, exact=True)]
    found = [hit.pair.pair_id for hit in store.nearest(embeddings[3], limit=10, filter=ALL)]
    assert len(set(exact) & set(found)) >= 9
    store.close()
    again = EdgePairStore.open(tmp_path / "pairs")
    assert again.count() == len(expected)
    again.close()


def test_a_build_that_fails_leaves_the_store_as_it_was(
    store: EdgePairStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(store, 3)
    monkeypatch.setattr(edge_shard, "_BUILD", "raise SystemExit('no')")
    with pytest.raises(RuntimeError, match="ended with 1: no"):
        store.optimize()
    assert [path.name for path in (tmp_path / "pairs").glob("shard-*")] == ["shard-1"]
    assert filled(store, 4).count() == 4


def test_what_a_killed_build_has_left_is_removed(blank: Path, tmp_path: Path) -> None:
    copy_folder(blank, tmp_path / "pairs")
    copy_folder(blank / "shard-1", tmp_path / "pairs" / "shard-2")
    store = EdgePairStore.open(tmp_path / "pairs")
    assert [path.name for path in (tmp_path / "pairs").glob("shard-*")] == ["shard-1"]
    store.close()


def test_quantized_embeddings_find_what_exact_ones_find(blank: Path, tmp_path: Path) -> None:
    copy_folder(blank, tmp_path / "pairs")
    settings = VectorSettings(exact_below_kib=1, quantization="int8")
    store = EdgePairStore.open(tmp_path / "pairs", settings=settings)
    embeddings = vectors(400)
    store.upsert([pair(number) for number in range(400)], embeddings)
    store.optimize()
    assert list((tmp_path / "pairs").rglob("quantized.data")), "the engine keeps quantized embeddings"
    same = 0
    for query in vectors(20, seed=5):
        exact = store.nearest(query, limit=10, filter=ALL, exact=True)
        found = store.nearest(query, limit=10, filter=ALL)
        same += len({hit.pair.pair_id for hit in exact} & {hit.pair.pair_id for hit in found})
        assert found[0].score == pytest.approx(exact[0].score, abs=1e-5), "the best are compared with the originals"
    assert same >= 190
    store.close()


def test_every_setting_reaches_the_engine(tmp_path: Path) -> None:
    settings = VectorSettings(m=5, ef_construct=33, exact_below_kib=77, quantization="int8")
    EdgePairStore.create(tmp_path / "pairs", embedding_size=3, settings=settings).close()
    written = (tmp_path / "pairs" / "shard-1" / "edge_config.json").read_text()
    for part in (
        '"m":5',
        '"ef_construct":33',
        '"full_scan_threshold":77',
        '"indexing_threshold":77',
        '"int8"',
        '"idf"',
    ):
        assert part in written


def test_the_log_stays_short(store: EdgePairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(store._shard, "flush", lambda: flushed.append(1))
    filled(store, SMALL.unflushed_points - 1)
    assert not flushed
    filled(store, 1)
    assert flushed


def test_copies_are_the_same_bytes(tmp_path: Path) -> None:
    content = b"".join((b"\0" * 200_000, np.random.default_rng(0).bytes(100_000), b"\0" * 70_000))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(content)
    (tmp_path / "a" / "empty").touch()
    copy_folder(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "b" / "file").read_bytes() == content
    assert (tmp_path / "c" / "empty").read_bytes() == b""
