"""Snapshots: consistent, checked to the byte, and restored ones answer alike."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path

import pytest

from common.service.errors import DataLoss, InvalidArgument
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair
from retrieval_svc.retrieval import Method, Query, Retrieval
from retrieval_svc.snapshot import SNAPSHOT, SnapshotError, restore, verify
from tests.retrieval_svc.small_pairs import FakeEmbedder, make_picture

QUERIES = [Query(prompt=prompt, k=5, method=method) for prompt in ("cat", "guide dog") for method in Method]


def _answer(retrieval: Retrieval) -> list[tuple[str, bytes]]:
    """Without scores: until Tantivy merges it away, a deleted pair counts in how rare its words are."""
    return [(n.pair.pair_id, n.image) for n in retrieval.neighbors]


def test_a_restored_knowledge_base_answers_alike(changing: KnowledgeBase, tmp_path: Path) -> None:
    changing.delete(["twemoji--cat"])
    changing.catch_up()
    expected = [_answer(changing.retrieve(query)) for query in QUERIES]
    fingerprint = changing.fingerprint
    report = changing.snapshot(tmp_path / "snapshots")
    assert report.folder == tmp_path / "snapshots" / "small" / str(changing.generation)
    assert (report.name, report.generation, report.num_pairs) == ("small", changing.generation, 27)
    assert report == changing.snapshot(tmp_path / "snapshots") == verify(report.folder), "made once"
    # What happens afterwards is not in it: not even where files are shared.
    changing.delete(["noto--guide-dog", "openmoji--cat"])
    changing.upsert([NewPair(pair_id="captioned", caption="cat, noto style", image=make_picture(7))])
    library = tmp_path / "library"
    assert restore(report.folder, library, "again") == library / "again"
    assert verify(report.folder) == report, "restoring changes nothing in it"
    with closing(Library.open(library, embedder=FakeEmbedder())) as opened:
        again = opened.get("again")
        assert [_answer(again.retrieve(query)) for query in QUERIES] == expected
        assert again.manifest.uuid == changing.manifest.uuid and again.fingerprint == fingerprint
        again.delete(["noto--cat", "noto-v1--cat"])
        assert again.stats().num_pairs == 25
        with pytest.raises(SnapshotError, match="library is in use by process"):
            restore(report.folder, library, "third")
    assert verify(report.folder) == report
    with pytest.raises(SnapshotError, match="again exists"):
        restore(report.folder, library, "again")
    with pytest.raises(InvalidArgument, match="name: 'No' is not"):
        restore(report.folder, library, "No")


def test_whatever_is_altered_is_found(changing: KnowledgeBase, tmp_path: Path) -> None:
    report = changing.snapshot(tmp_path / "snapshots")
    files = sorted(path for path in report.folder.rglob("*") if path.is_file() and path.name != SNAPSHOT)
    pictures = [path for path in files if path.parent.parent.name == "images"]
    others = [path for path in files if path not in pictures and path.stat().st_size]
    smallest = sorted(others, key=lambda path: path.stat().st_size)[:6]
    assert len(pictures) == 27
    for path in (pictures[0], *smallest):
        content = path.read_bytes()
        path.unlink()  # a picture is a hard link: the original must not change
        with pytest.raises(SnapshotError, match=f"{path.name} is missing"):
            verify(report.folder)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SnapshotError, match=f"{path.name} is altered"):
            verify(report.folder)
        path.write_bytes(content)
    (report.folder / "pairs" / "extra").write_text("x")
    with pytest.raises(SnapshotError, match="extra does not belong there"):
        verify(report.folder)
    with pytest.raises(SnapshotError, match="extra does not belong there"):
        restore(report.folder, tmp_path / "library", "again")
    assert not (tmp_path / "library").exists()
    with pytest.raises(DataLoss, match="extra does not belong there"):
        changing.snapshot(tmp_path / "snapshots")
    document = json.loads((report.folder / SNAPSHOT).read_text())
    (report.folder / SNAPSHOT).write_text(json.dumps(document | {"format": "other/1"}))
    with pytest.raises(SnapshotError, match="has format 'other/1'"):
        verify(report.folder)
    (report.folder / SNAPSHOT).unlink()
    with pytest.raises(SnapshotError, match="cannot be read"):
        verify(report.folder)


def test_a_damaged_picture_is_no_snapshot(changing: KnowledgeBase, tmp_path: Path) -> None:
    sha256 = changing.get("captioned").pair.image_sha256
    (changing.folder / "images" / sha256[:2] / sha256[2:]).write_bytes(b"half")
    with pytest.raises(DataLoss, match=f"{sha256[2:]} is altered"):
        changing.snapshot(tmp_path / "snapshots")


def test_a_snapshot_is_one_moment_of_a_changing_knowledge_base(changing: KnowledgeBase, tmp_path: Path) -> None:
    """Pairs are written two by two: a snapshot holds both or none."""
    stop = threading.Event()

    def write() -> None:
        for turn in range(200):
            if stop.is_set():
                return
            pairs = [NewPair(pair_id=f"{side}{turn}", caption="x", image=make_picture(9_000 + turn)) for side in "ab"]
            changing.upsert(pairs)

    writing = threading.Thread(target=write)
    writing.start()
    report = changing.snapshot(tmp_path / "snapshots")
    stop.set()
    writing.join()
    restore(report.folder, tmp_path / "library", "again")
    with closing(KnowledgeBase.open(tmp_path / "library" / "again")) as again:
        assert again.generation == report.generation
        stats = again.stats()
        assert stats.num_pairs == stats.num_indexed_pairs == report.num_pairs
        assert (stats.num_pairs - 28) % 2 == 0
        pairs, following = again.page(limit=1000)
        assert following == "" and all(again.get(p.pair_id, with_image=True).image for p in pairs)
