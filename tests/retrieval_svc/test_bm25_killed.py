"""A process that is killed while Tantivy commits leaves files; the next one must not stumble over them."""

from __future__ import annotations

import shutil
from pathlib import Path

from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.pairs import Change, StoredPair, point_of


def change(number: int, version: int, *, is_deleted: bool = False) -> Change:
    pair = StoredPair(pair_id=f"p{number}", caption="cat", entity="cat", version=version)
    return Change(point=point_of(pair.pair_id), version=version, pair=None if is_deleted else pair)


def test_files_of_a_commit_that_did_not_end_are_no_hindrance(tmp_path: Path) -> None:
    """Which documents are deleted stands in a file that bears the commit's number: the same number comes again."""
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([change(number, number + 1) for number in range(5)])
    index.close()
    shutil.copytree(tmp_path / "index", tmp_path / "killed")
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([change(2, 10, is_deleted=True)])
    index.close()
    (left,) = {path.name for path in (tmp_path / "index").iterdir()} - {p.name for p in (tmp_path / "killed").iterdir()}
    for name in (left, ".managed.json"):  # written before what makes the commit valid
        shutil.copy(tmp_path / "index" / name, tmp_path / "killed" / name)
    index = TantivyIndex.open(tmp_path / "killed")
    index.apply([change(2, 10, is_deleted=True)])
    assert (index.num_pairs, index.generation) == (4, 10)
    index.close()
