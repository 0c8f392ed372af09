"""A data folder of knowledge bases: one process at a time, one damaged does not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common.service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.in_flight import InFlight
from retrieval_svc.library import Library, LibraryError
from retrieval_svc.manifest import MANIFEST, PAIRS
from retrieval_svc.pairs import NewPair
from retrieval_svc.retrieval import Query
from tests.retrieval_svc.small_pairs import SCENE_PHRASES, STYLE, FakeEmbedder, make_picture

HOLD = """
import sys, pathlib
from retrieval_svc.in_flight import InFlight
from retrieval_svc.library import Library
library = Library.open(pathlib.Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def library(tmp_path: Path, small_folder: Path) -> Iterator[Library]:
    """One with the small knowledge base."""
    copy_folder(small_folder, tmp_path / "data" / "small")
    with closing(Library.open(tmp_path / "data", embedder=FakeEmbedder())) as opened:
        yield opened


def test_knowledge_bases_come_and_go(library: Library) -> None:
    assert library.names() == ["small"] and library.get("small").num_pairs == 28
    made = library.create("a-second", facets=(STYLE,), scene_phrases=SCENE_PHRASES)
    assert library.names() == ["a-second", "small"]
    assert library.get("a-second") is made and made.name == "a-second"
    assert (made.manifest.embedding_model, made.manifest.embedding_size) == ("fake-embedder", 8)
    assert made.manifest.facets == (STYLE,) and made.manifest.scene_phrases == SCENE_PHRASES
    made.upsert([NewPair(pair_id="x", caption="zeppelin", image=make_picture(1))])
    made.catch_up()
    assert len(made.retrieve(Query(prompt="zeppelin")).neighbors) == 1
    assert not library.get("small").retrieve(Query(prompt="zeppelin")).neighbors, "each has its own pairs"

    library.delete("a-second")
    assert library.names() == ["small"]
    assert not [path for path in library.folder.iterdir() if "second" in path.name]
    with pytest.raises(NotFound, match="'a-second' is not one of small"):
        library.get("a-second")
    with pytest.raises(NotFound, match="'a-second' is not one of small"):
        library.delete("a-second")
    with pytest.raises(NotFound, match="'a-second' is closed"):
        made.retrieve(Query(prompt="zeppelin"))


def test_it_is_the_same_after_reopening(library: Library, tmp_path: Path) -> None:
    library.create("raw", embedding_size=3)
    library.create("words", embedding_size=0)
    uuids = {name: library.get(name).manifest.uuid for name in library.names()}
    library.close()
    with closing(Library.open(tmp_path / "data")) as again:
        assert {name: again.get(name).manifest.uuid for name in again.names()} == uuids
        sizes = {name: again.get(name).manifest.embedding_size for name in again.names()}
        assert sizes == {"raw": 3, "small": 8, "words": 0}
        assert again.get("raw").manifest.embedding_model == ""


@pytest.mark.parametrize("name", ["", "Small", "1st", "a_b", "-a", "a" * 64, "../small", "a/b", "é"])
def test_names_that_cannot_be(library: Library, name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"name: .* is not 1 to 63 of a-z"):
        library.create(name)


def test_what_cannot_be_made(library: Library) -> None:
    with pytest.raises(AlreadyExists, match="'small' exists"):
        library.create("small")
    with pytest.raises(InvalidArgument, match="embedding_size: -1 "):
        library.create("other", embedding_size=-1)
    with pytest.raises(InvalidArgument, match="facets: 'style' stands twice"):
        library.create("other", facets=(STYLE, STYLE))
    assert library.names() == ["small"]
    assert sorted(path.name for path in library.folder.iterdir()) == ["lock", "small"], "nothing half-made is left"


def test_a_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holding = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holding.stdout is not None and holding.stdout.readline() == "open\n"
        with pytest.raises(LibraryError, match=f"library: {tmp_path} is in use by process {holding.pid}"):
            Library.open(tmp_path)
    finally:
        holding.kill()
        holding.communicate()
    Library.open(tmp_path).close()  # the kernel has let go


def test_a_damaged_one_does_not_stop_the_others(library: Library, tmp_path: Path) -> None:
    for name in ("cut", "strange", "copied"):
        library.create(name, embedding_size=0)
    library.close()
    data = tmp_path / "data"
    (data / "cut" / MANIFEST).write_text('{"format": "reimagen-knowle')
    (data / "strange" / PAIRS / "store.json").unlink()
    (data / "copied" / MANIFEST).write_text((data / "small" / MANIFEST).read_text().replace(': "small"', ': "tall"'))
    (data / "elsewhere").mkdir()
    with closing(Library.open(data)) as again:
        assert again.names() == ["small"] and again.damaged.keys() == {"copied", "cut", "strange"}
        for name, reason in {"cut": MANIFEST, "strange": "store.json", "copied": "names 'tall'|says 8"}.items():
            with pytest.raises(FailedPrecondition, match=rf"'{name}' could not be opened: .*({reason})"):
                again.get(name)
        again.delete("cut")
        assert not (data / "cut").exists() and "cut" not in again.damaged
        with pytest.raises(AlreadyExists):
            again.create("elsewhere")


def test_leftovers_are_cleaned_up(library: Library, tmp_path: Path) -> None:
    library.close()
    data = tmp_path / "data"
    for leftover in (".removed-small-abc", ".small.abc.part", ".small.abc.old"):
        copy_folder(data / "small", data / leftover / "small")
    with closing(Library.open(data)) as again:
        assert sorted(path.name for path in data.iterdir()) == ["lock", "small"]
        assert again.get("small").num_pairs == 28


def test_deleting_waits_for_the_calls_under_way(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    small = library.get("small")
    is_searching, go_on = threading.Event(), threading.Event()
    search = small._lexical.search

    def slow(lookup):  # type: ignore[no-untyped-def]
        is_searching.set()
        assert go_on.wait(20)
        return search(lookup)

    monkeypatch.setattr(small._lexical, "search", slow)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(len(small.retrieve(Query(prompt="cat")).neighbors)))
    asking.start()
    assert is_searching.wait(20)
    deleting = threading.Thread(target=library.delete, args=("small",))
    deleting.start()
    deleting.join(0.2)
    assert deleting.is_alive() and library.names() == []
    go_on.set()
    asking.join()
    deleting.join()
    assert found == [2] and not (library.folder / "small").exists()


def test_closing_waits_for_the_last_use() -> None:
    in_flight = InFlight(lambda: NotFound("closed"))
    closed = threading.Event()
    closing_thread = threading.Thread(target=lambda: (in_flight.close(), closed.set()))
    with in_flight:
        closing_thread.start()
        assert not closed.wait(0.2)
        with pytest.raises(NotFound, match="closed"), in_flight:
            pass
    assert closed.wait(20)
    assert not in_flight.close(), "only the first closes"
