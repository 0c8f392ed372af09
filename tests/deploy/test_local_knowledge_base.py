"""The demonstration knowledge base: made once, gone on with after an interruption, and copied for each command."""

from __future__ import annotations

import io
import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from client.display import Lines
from common.corpus import CorpusError, Pair, write_corpus
from deploy.local.knowledge_base import LIBRARY, NAME, ensure_knowledge_base
from deploy.local.working_copy import COPIES, working_copy
from retrieval_svc.folder_lock import FolderInUse
from retrieval_svc.iconify import FACETS, VERSION
from retrieval_svc.library import Library
from retrieval_svc.retrieval import Query
from tests.generator_svc.tiny_stack import make_pairs

Said = io.StringIO


def write_demo(folder: Path, pairs: list[Pair]) -> None:
    """A corpus of the demonstration's version."""
    write_corpus(folder / "corpus", pairs, name="tiny", version=VERSION, facets=FACETS, pairs_per_shard=5)


def ids(folder: Path) -> list[str]:
    """Ids of the pairs that the library holds."""
    with closing(Library.open(folder / LIBRARY)) as library:
        return sorted(pair.pair_id for pair in library.get(NAME).page()[0])


class Interrupting(Lines):
    """Ends the run after the first pairs."""

    def built(self, task: str, total: int, item: str) -> None:
        raise KeyboardInterrupt


def test_a_second_run_builds_nothing(tmp_path: Path) -> None:
    write_demo(tmp_path, make_pairs())
    first, second = Said(), Said()
    assert ensure_knowledge_base(tmp_path, Lines(first)) == tmp_path / LIBRARY
    assert "pairs: 12/12" in first.getvalue()
    with closing(Library.open(tmp_path / LIBRARY)):  # a second run does not even ask for the lock
        ensure_knowledge_base(tmp_path, Lines(second))
    assert second.getvalue() == ""
    assert ids(tmp_path) == sorted(pair.key for pair in make_pairs())


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    write_demo(tmp_path, make_pairs())
    with pytest.raises(KeyboardInterrupt):
        ensure_knowledge_base(tmp_path, Interrupting(Said()))
    assert json.loads((tmp_path / "imported.json").read_text())["complete"] is False
    said = Said()
    ensure_knowledge_base(tmp_path, Lines(said))
    assert "pairs: 12/12" in said.getvalue()
    assert ids(tmp_path) == sorted(pair.key for pair in make_pairs())
    assert json.loads((tmp_path / "imported.json").read_text())["complete"] is True


def test_a_new_corpus_takes_the_old_ones_place(tmp_path: Path) -> None:
    write_demo(tmp_path, make_pairs())
    ensure_knowledge_base(tmp_path, Lines(Said()))
    fewer = [replace(pair, author="another") for pair in make_pairs()[:4]]
    write_demo(tmp_path, fewer)
    ensure_knowledge_base(tmp_path, Lines(Said()))
    assert ids(tmp_path) == sorted(pair.key for pair in fewer)


def test_a_knowledge_base_of_another_vocabulary_is_made_anew(tmp_path: Path) -> None:
    """Which styles are alike is no part of a corpus' fingerprint."""
    write_demo(tmp_path, make_pairs())
    ensure_knowledge_base(tmp_path, Lines(Said()))
    mark = tmp_path / "imported.json"
    said = json.loads(mark.read_text())
    assert said["facets"][0]["alike"]["noto"][0] == "twemoji"
    mark.write_text(json.dumps({name: value for name, value in said.items() if name != "facets"}))  # as before facets
    again = Said()
    ensure_knowledge_base(tmp_path, Lines(again))
    assert "pairs: 12/12" in again.getvalue()
    with closing(Library.open(tmp_path / LIBRARY)) as library:
        assert library.get(NAME).manifest.facets == FACETS


def test_a_cut_corpus_is_told_and_not_taken_for_whole(tmp_path: Path) -> None:
    write_demo(tmp_path, make_pairs())
    shard = tmp_path / "corpus" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-4000])
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"pairs that cannot be taken .*shard altered.*import\.jsonl"):
            ensure_knowledge_base(tmp_path, Lines(Said()))


def test_commands_have_copies_of_their_own(tmp_path: Path) -> None:
    write_demo(tmp_path, make_pairs())
    library = ensure_knowledge_base(tmp_path, Lines(Said()))
    (tmp_path / COPIES).mkdir()
    (tmp_path / COPIES / "abandoned").mkdir()
    pictures = sorted((library / NAME / "images").rglob("*"))
    with working_copy(library) as first, working_copy(library) as second:
        assert not (tmp_path / COPIES / "abandoned").exists() and first.is_dir() and second.is_dir()
        with closing(Library.open(first)) as one, closing(Library.open(second)) as two:
            query = Query(prompt="guide dog, noto style", k=3)
            found = [base.get(NAME).retrieve(query) for base in (one, two)]
            assert [n.pair.pair_id for n in found[0].neighbors] == [n.pair.pair_id for n in found[1].neighbors]
            assert all(n.image for n in found[0].neighbors)
            one.get(NAME).delete([pair.key for pair in make_pairs()])
            assert len(two.get(NAME).retrieve(query).neighbors) == 3
    assert list((tmp_path / COPIES).iterdir()) == []
    assert sorted((library / NAME / "images").rglob("*")) == pictures, "the library has lost none"
    assert len(ids(tmp_path)) == 12
    with (
        closing(Library.open(library)),
        pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"),
        working_copy(library),
    ):
        pass
