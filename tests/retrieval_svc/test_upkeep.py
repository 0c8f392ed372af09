"""Graphs are built without anybody asking, and nobody waits for them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from retrieval_svc import build_debt, edge_shard
from retrieval_svc.build_debt import BuildDebt
from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.library import Library
from retrieval_svc.retrieval import Method, Query
from retrieval_svc.upkeep import Upkeep
from tests.retrieval_svc.small_pairs import FakeEmbedder, small_pairs


@pytest.fixture
def data(tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library whose graphs are due after ten changes."""
    monkeypatch.setattr(build_debt, "MIN_CHANGES", 10)
    copy_folder(small_folder, tmp_path / "data" / "small")
    return tmp_path / "data"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def shards(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "small" / "pairs").glob("shard-*"))


def test_a_graph_is_built_when_enough_has_changed(data: Path) -> None:
    before = shards(data)
    with closing(Library.open(data, embedder=FakeEmbedder())) as library:
        small = library.get("small")
        small.optimize()
        built = shards(data)
        assert built != before and not (data / "small" / "unbuilt").exists()
        with closing(Upkeep(library, look_every_s=0.05)):
            time.sleep(0.3)
            assert shards(data) == built, "nothing is due"
            assert small.delete([pair.pair_id for pair in small_pairs()[:12]])[0] == 12
            until(lambda: shards(data) != built)
            until(lambda: not (data / "small" / "unbuilt").exists())
        assert small.retrieve(Query(prompt="cat", method=Method.CLIP)).neighbors


def test_building_is_given_up_at_the_end(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = data / "begun"
    monkeypatch.setattr(
        edge_shard, "_BUILD", f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(99)"
    )
    with closing(Library.open(data, embedder=FakeEmbedder())) as library:
        before = shards(data)
        small = library.get("small")
        small.delete([pair.pair_id for pair in small_pairs()[:12]])
        upkeep = Upkeep(library, look_every_s=0.05)
        until(begun.exists)
        started = time.monotonic()
        upkeep.close()
        assert small.retrieve(Query(prompt="cat")), "the store itself is as it was"
    assert time.monotonic() - started < 20
    assert shards(data) == before
    with closing(Library.open(data, embedder=FakeEmbedder())) as library:
        assert library.get("small")._debt.is_due(10), "the next process knows what is left to be done"


def test_a_knowledge_base_that_is_deleted_stops_its_building(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = data / "begun"
    monkeypatch.setattr(
        edge_shard, "_BUILD", f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(99)"
    )
    with closing(Library.open(data, embedder=FakeEmbedder())) as library:
        library.get("small").delete([pair.pair_id for pair in small_pairs()[:12]])
        with closing(Upkeep(library, look_every_s=0.05)):
            until(begun.exists)
            library.delete("small")
    assert not (data / "small").exists()


def test_what_an_earlier_process_has_left_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_debt, "MIN_CHANGES", 10)
    debt = BuildDebt(tmp_path, 1000)
    assert not debt.is_due(1000)
    debt.add(199)
    assert not debt.is_due(1000)
    debt.add(1)
    assert debt.is_due(1000)
    begun = debt.begin()
    debt.add(3)
    debt.end(begun)
    assert not debt.is_due(1000) and (tmp_path / "unbuilt").exists(), "three came while it was built"
    assert BuildDebt(tmp_path, 1000).is_due(1000), "how many is not known any more: all"
    debt.end(3)
    assert not BuildDebt(tmp_path, 1000).is_due(1000)
