"""The order of hits: whole names, then scores, then facets, then a hash; nothing is query syntax."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from retrieval_svc.bm25 import Bm25Index, Bm25Writer, Entry, FacetCodes, Hits, Lookup, name_key

CODES = FacetCodes({"style": ("noto", "twemoji", "openmoji")})


def _entry(pair_id: str, text: str, style: str = "noto", content: str = "") -> Entry:
    return Entry(
        pair_id=pair_id,
        text=text,
        facets={"style": style},
        content=hashlib.sha256((content or pair_id).encode()).digest(),
        payload={"pair_id": pair_id},
    )


def _index(folder: Path, entries: Sequence[Entry]) -> Bm25Index:
    folder.mkdir()
    with Bm25Writer(folder, CODES) as writer:
        for entry in entries:
            writer.add(entry)
    return Bm25Index(folder, CODES)


def _search(index: Bm25Index, entity: str, *details: str, k: int = 100, style: str = "", exclude: str = "") -> Hits:
    return index.search(
        Lookup(
            entity=entity,
            details=details,
            facets={"style": style} if style else {},
            k=k,
            excluded_pair_ids=frozenset(exclude.split()),
            exclude_exact=False,
        )
    )


def _ids(hits: Hits) -> list[str]:
    return [hit.payload["pair_id"] for hit in hits.hits]


def _tie(pair_id: str) -> int:
    return int.from_bytes(hashlib.sha256(pair_id.encode()).digest()[:8], "big")


def test_ties_of_many_pages_come_whole_and_in_one_order(tmp_path: Path) -> None:
    styles = ("noto", "twemoji", "openmoji")
    entries = [_entry(f"p{n}", f"flag {n:04d}", styles[n % 3]) for n in range(700)]
    forward, backward = _index(tmp_path / "a", entries), _index(tmp_path / "b", entries[::-1])
    expected = sorted(entries, key=lambda e: (e.facets["style"] != "twemoji", _tie(e.pair_id)))
    for k in (1, 2, 63, 64, 65, 300, 700, 701):
        for index in (forward, backward):
            assert _ids(_search(index, "flag", k=k, style="twemoji")) == [e.pair_id for e in expected[:k]]


def test_whole_names_stand_before_names_that_contain_them(tmp_path: Path) -> None:
    index = _index(
        tmp_path / "index",
        [
            _entry("repeated", "dog dog dog"),
            _entry("longer", "guide dog"),
            _entry("whole", "The Dog"),
            _entry("texas", "Paris, Texas"),
            _entry("paris", "Paris"),
            _entry("texas hat", "texas hat"),
        ],
    )
    assert _ids(_search(index, "dog"))[0] == "whole"
    assert _ids(_search(index, "paris", "texas"))[:2] == ["texas", "paris"]
    assert _ids(_search(index, "paris", "a hat"))[:2] == ["paris", "texas"]


def test_stems_find_but_do_not_mistake(tmp_path: Path) -> None:
    index = _index(tmp_path / "index", [_entry("university", "university"), _entry("universal", "universal remote")])
    assert _ids(_search(index, "universities"))[0] == "university"
    assert _ids(_search(index, "the universal"))[0] == "universal"
    assert _ids(_search(index, "university hall"))[0] == "university"


@pytest.mark.parametrize(
    ("entity", "found"),
    [
        ("flag: Côte d\u2019Ivoire", "ivoire"),
        ("FLAG COTE D'IVOIRE", "ivoire"),
        ("1st place medal", "medal"),
        ("man\u2019s shoe", "shoe"),
        ("t. rex", "rex"),
        ("\uff54\uff0d\uff52\uff45\uff58", "rex"),
        ('+rex -"shoe AND (OR:^2~ *?[ TO ]} \\', "rex"),
    ],
)
def test_punctuation_accents_and_query_syntax_are_plain_text(tmp_path: Path, entity: str, found: str) -> None:
    names = {"ivoire": "flag cote divoire", "medal": "1st place medal", "shoe": "mans shoe", "rex": "T-Rex"}
    index = _index(tmp_path / "index", [_entry(pair_id, name) for pair_id, name in names.items()])
    assert _ids(_search(index, entity))[0] == found


def test_an_excluded_pair_takes_its_picture_along(tmp_path: Path) -> None:
    index = _index(
        tmp_path / "index",
        [
            _entry("a", "cat", content="one"),
            _entry("b", "cat", content="one"),
            _entry("c", "cat", content="two"),
        ],
    )
    hits = _search(index, "cat", exclude="a no-such-pair")
    assert (_ids(hits), hits.num_excluded) == (["c"], 2)
    hits = _search(index, "cat")
    assert (len(hits.hits), hits.num_duplicates) == (2, 1)


def test_nothing_to_look_up_finds_nothing(tmp_path: Path) -> None:
    index = _index(tmp_path / "index", [_entry("a", "cat")])
    assert _search(index, "").hits == ()
    assert _search(index, "☃").hits == ()
    assert _search(index, "zebra").hits == ()


def test_an_index_opens_where_nobody_may_write(tmp_path: Path) -> None:
    """Tantivy itself writes a lock file beside an index that it opens."""
    index = _index(tmp_path / "index", [_entry("a", "cat")])
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    assert not any(name.endswith(".lock") for name in files)
    for path in (tmp_path / "index").iterdir():
        assert path.stat().st_mode & 0o444 == 0o444
    again = Bm25Index(tmp_path / "index", CODES)
    assert again.num_pairs == index.num_pairs == 1
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == files


def test_name_key() -> None:
    assert name_key("The Côte d'Azur!") == name_key("cote dazur") == "cote dazur"
    assert name_key("a") == "a"
