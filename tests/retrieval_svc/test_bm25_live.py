"""The life of the index: changes, crashes, damage, a full disk, and searches while it is written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.pairs import Change, Lookup, StoredPair, point_of
from tests.retrieval_svc.bm25_modes import searched_in  # noqa: F401 (every test runs in both)


def added(pair_id: str, entity: str, version: int) -> Change:
    stored = StoredPair(pair_id=pair_id, caption=entity, entity=entity, version=version)
    return Change(point=point_of(pair_id), version=version, pair=stored)


def removed(pair_id: str, version: int) -> Change:
    return Change(point=point_of(pair_id), version=version, pair=None)


def found(index: TantivyIndex, entity: str, limit: int = 1000) -> list[str]:
    return sorted(hit.pair.pair_id for hit in index.search(Lookup(entity=entity, limit=limit)))


CHANGES = (added("a", "cat", 1), added("b", "cat", 2), added("a", "dog", 3), removed("b", 4), added("c", "cat", 5))


@pytest.mark.parametrize("commit_size", [1, 2, 5])
def test_changes_are_taken_in_and_taking_them_in_again_changes_nothing(tmp_path: Path, commit_size: int) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    assert (index.num_pairs, index.generation) == (0, 0)
    for _ in range(2):
        for start in range(0, len(CHANGES), commit_size):
            index.apply(CHANGES[start : start + commit_size])
        assert (found(index, "cat"), found(index, "dog"), index.num_pairs) == (["c"], ["a"], 2)
        assert index.generation == 5
    index.apply([])
    index.close()
    again = TantivyIndex.open(tmp_path / "index")
    assert (found(again, "cat"), again.num_pairs, again.generation) == (["c"], 2, 5)
    again.apply([removed("c", 6)])
    assert (found(again, "cat"), again.generation) == ([], 6)


def test_a_change_that_comes_in_late_does_not_set_the_generation_back(tmp_path: Path) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 10)])
    index.apply([added("b", "cat", 7)])
    assert (index.generation, found(index, "cat")) == (10, ["a", "b"])


def test_rebuilding_leaves_what_the_store_holds_and_nothing_else(tmp_path: Path) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 1), added("gone", "cat", 2), added("b", "dog", 3)])
    seen: list[list[str]] = []

    def batches() -> list[Sequence[Change]]:
        seen.append(found(index, "cat"))
        return [[added("a", "cat", 1)], [added("c", "cat", 4)]]

    index.rebuild(batch for batch in batches())
    assert seen == [["a", "gone"]], "searches go on with what there was"
    assert (found(index, "cat"), found(index, "dog"), index.generation) == (["a", "c"], [], 4)
    index.apply([added("d", "cat", 5)])
    index.rebuild([[added("d", "cat", 5)]])
    assert (found(index, "cat"), index.num_pairs) == (["d"], 1)
    index.close()
    assert found(TantivyIndex.open(tmp_path / "index"), "cat") == ["d"]


def test_a_rebuild_that_is_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 1), added("gone", "cat", 2)])

    def broken() -> object:
        yield [added("a", "cat", 1), added("new", "cat", 9)]
        raise OSError(errno.EIO, "the store has gone")

    with pytest.raises(OSError, match="the store has gone"):
        index.rebuild(broken())  # type: ignore[arg-type]
    assert (index.generation, found(index, "cat")) == (2, ["a", "gone"])
    index.close()
    index = TantivyIndex.open(tmp_path / "index")
    assert index.generation == 2
    index.rebuild([[added("a", "cat", 1)]])
    assert found(index, "cat") == ["a"]


def test_killed_before_the_first_cursor_it_begins_anew(tmp_path: Path) -> None:
    """A commit without a cursor: what it holds may have been deleted from the store meanwhile."""
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 1)])
    index.close()
    (tmp_path / "index" / "cursor.json").unlink()
    again = TantivyIndex.open(tmp_path / "index")
    assert (again.generation, again.num_pairs) == (0, 0)
    assert not (tmp_path / "index.damaged").exists()


DAMAGE = ["flipped", "truncated", "missing", "meta", "meta missing", "cursor", "format"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_moved_aside_and_begun_anew(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "index"
    index = TantivyIndex.open(folder)
    index.apply([added(f"p{n}", f"cat {n}", n + 1) for n in range(200)])
    index.apply([removed("p0", 300)])
    index.close()
    store = max(folder.glob("*.store"), key=lambda path: path.stat().st_size)
    content = bytearray(store.read_bytes())
    content[len(content) // 3] ^= 1
    match damage:
        case "flipped":
            store.write_bytes(content)
        case "truncated":
            store.write_bytes(content[: len(content) // 2])
        case "missing":
            store.unlink()
        case "meta":
            (folder / "meta.json").write_text("{")
        case "meta missing":
            (folder / "meta.json").unlink()
        case "cursor":
            (folder / "cursor.json").write_text("[]")
        case "format":
            (folder / "cursor.json").write_text(json.dumps({"format": "another/2", "generation": 1, "epoch": 0}))
    (tmp_path / "index.damaged").mkdir()  # an earlier one makes room
    again = TantivyIndex.open(folder)
    assert (again.generation, again.num_pairs) == (0, 0)
    assert (tmp_path / "index.damaged" / "cursor.json").exists()
    again.apply([added("a", "cat", 1)])
    assert found(again, "cat") == ["a"]


def test_files_that_a_killed_process_left_half_written_are_no_damage(tmp_path: Path) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 1)])
    index.close()
    (tmp_path / "index" / ("0" * 32 + ".store")).write_bytes(b"half a segment")
    assert found(TantivyIndex.open(tmp_path / "index"), "cat") == ["a"]
    assert not (tmp_path / "index.damaged").exists()


def test_a_full_disk_is_an_os_error_and_the_index_goes_on(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow: what a full disk looks like to a writer."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from tests.retrieval_svc.test_bm25_live import TantivyIndex, added, found
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
index = TantivyIndex.open(Path({str(tmp_path / "index")!r}))
index.apply([added("a", "cat", 1)])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        index.apply([added(f"p{{n}}", f"cat {{n}} " + "x" * n, n + 2) for n in range(500)])
    except OSError as error:
        print(error.errno, index.generation, found(index, "cat"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
index.apply([added("b", "cat", 2)])
print(index.generation, found(index, "cat"))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{errno.EFBIG} 1 ['a']"] * 2 + ["2 ['a', 'b']"]


def test_searches_never_see_half_of_a_batch(tmp_path: Path) -> None:
    """Each batch replaces all fifty pairs: a search finds all of one, never a mixture."""
    index = TantivyIndex.open(tmp_path / "index")
    words = [f"cat{'abcdefghij'[n]}" for n in range(10)]

    def batch(n: int) -> list[Change]:
        return [added(f"p{i}", f"beast {words[n]}", n * 50 + i + 1) for i in range(50)]

    index.apply(batch(0))
    wrong: list[object] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            hits = index.search(Lookup(entity="beast", limit=100))
            if len(hits) != 50 or len({hit.pair.entity for hit in hits}) != 1:
                wrong.append(sorted({hit.pair.entity for hit in hits}))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, 10):
            index.apply(batch(n))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert {hit.pair.entity for hit in index.search(Lookup(entity="beast"))} == {"beast catj"}


def test_closing_leaves_a_folder_that_can_be_copied_and_opened(tmp_path: Path) -> None:
    index = TantivyIndex.open(tmp_path / "index")
    index.apply([added("a", "cat", 1)])
    index.close()
    index.close()
    shutil.copytree(tmp_path / "index", tmp_path / "copy")
    assert found(TantivyIndex.open(tmp_path / "copy"), "cat") == ["a"]
