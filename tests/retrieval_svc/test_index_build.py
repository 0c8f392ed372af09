"""Building an index: once, whole or not at all, and bad input is named."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from common.corpus import CorpusError, Pair, iter_pairs
from common.service.errors import DataLoss
from retrieval_svc.index_build import build_index
from retrieval_svc.index_folder import BM25, IMAGES, MANIFEST, IndexFolderError, read_index_manifest
from retrieval_svc.knowledge_base import KnowledgeBase

Run = Callable[..., CompletedProcess[str]]


def _silent(done: int, total: int) -> None:
    del done, total


def _listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_second_build_does_nothing(tmp_path: Path, corpus: Path, run_retrieval: Run) -> None:
    index = tmp_path / "index"
    first = run_retrieval("build", "--corpus", corpus, "--index", index)
    assert (first.returncode, first.stdout) == (0, f"built: {index}\n")
    before = _listing(tmp_path)
    second = run_retrieval("build", "--corpus", corpus, "--index", index)
    assert (second.returncode, second.stdout) == (0, f"up to date: {index}\n")
    assert _listing(tmp_path) == before


def test_progress_reaches_its_end(tmp_path: Path, corpus: Path) -> None:
    reports: list[tuple[int, int]] = []
    build_index(corpus, tmp_path / "index", lambda done, total: reports.append((done, total)))
    total = read_index_manifest(tmp_path / "index").num_pairs
    assert reports == [(n, total) for n in range(1, total + 1)]


def test_another_corpus_replaces_the_index(
    tmp_path: Path, corpus: Path, write_small_corpus: Callable[..., Path]
) -> None:
    index = tmp_path / "index"
    build_index(corpus, index, _silent)
    before = read_index_manifest(index)
    fewer = write_small_corpus(tmp_path / "fewer", list(iter_pairs(corpus))[:3])
    assert build_index(fewer, index, _silent)
    after = read_index_manifest(index)
    assert (after.num_pairs, after.fingerprint != before.fingerprint) == (3, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fewer", "index"]


def test_a_cut_shard_is_named_and_the_former_index_stays(
    tmp_path: Path, corpus: Path, write_small_corpus: Callable[..., Path], run_retrieval: Run
) -> None:
    index = tmp_path / "index"
    build_index(write_small_corpus(tmp_path / "former", list(iter_pairs(corpus))[:3]), index, _silent)
    cut = shutil.copytree(corpus, tmp_path / "cut")
    shard = cut / "00001.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    before = _listing(tmp_path)
    done = run_retrieval("build", "--corpus", cut, "--index", index)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(shard) in done.stderr
    assert _listing(tmp_path).keys() == before.keys()
    assert read_index_manifest(index).num_pairs == 3


@pytest.mark.parametrize("limit_bytes", [2_000, 12_000])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, write_small_corpus: Callable[..., Path], run_retrieval: Run, limit_bytes: int
) -> None:
    """A limit on the size of files stands for the full disk: of the pictures, then of what Tantivy writes."""
    pairs = [
        Pair(
            key=f"p{n}",
            caption=f"thing {n}",
            image=os.urandom(4) * 10,
            image_format="png",
            entity=f"thing {n}",
        )
        for n in range(250)
    ]
    corpus = write_small_corpus(tmp_path / "corpus", pairs)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    (tmp_path / "place").mkdir()
    index = tmp_path / "place" / "index"
    done = run_retrieval("build", "--corpus", corpus, "--index", index, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"retrieval_svc: error: File too large: {index}\n"
    assert list((tmp_path / "place").iterdir()) == []


def test_bad_corpora_are_refused_by_name(tmp_path: Path, corpus: Path, write_small_corpus: Callable[..., Path]) -> None:
    index = tmp_path / "index"
    with pytest.raises(CorpusError, match=r"corpus\.json does not exist"):
        build_index(tmp_path / "nowhere", index, _silent)
    with pytest.raises(CorpusError, match="holds no pairs"):
        build_index(write_small_corpus(tmp_path / "empty", []), index, _silent)
    first = next(iter_pairs(corpus))
    strange = write_small_corpus(tmp_path / "strange", [replace(first, facets={"style": "vaporwave"})])
    with pytest.raises(CorpusError, match=f"pair '{first.key}' has style 'vaporwave'"):
        build_index(strange, index, _silent)
    miscounted = shutil.copytree(corpus, tmp_path / "miscounted")
    document = json.loads((miscounted / "corpus.json").read_text()) | {"num_pairs": 7}
    (miscounted / "corpus.json").write_text(json.dumps(document))
    with pytest.raises(CorpusError, match="its manifest says 7"):
        build_index(miscounted, index, _silent)
    assert not index.exists()


def test_a_folder_that_is_no_index_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.txt").write_text("years of work")
    with pytest.raises(IndexFolderError, match="exists and is no index"):
        build_index(corpus, tmp_path / "thesis", _silent)
    assert (tmp_path / "thesis" / "chapter-1.txt").exists()
    (tmp_path / "void").mkdir()
    assert build_index(corpus, tmp_path / "void", _silent)


@pytest.mark.parametrize("part", [MANIFEST, IMAGES, "bm25/meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_index_is_refused_and_built_again(
    tmp_path: Path, corpus: Path, index: Path, part: str, damage: str
) -> None:
    copy = shutil.copytree(index, tmp_path / "index")
    if damage == "missing":
        (copy / part).unlink()
    else:
        os.truncate(copy / part, 0 if damage == "empty" else (copy / part).stat().st_size // 2)
    with pytest.raises(IndexFolderError, match=str(copy)):
        KnowledgeBase.open(copy)
    if part != MANIFEST or damage != "missing":  # without its manifest it is some folder, which is left alone
        assert build_index(corpus, copy, _silent)
        KnowledgeBase.open(copy).close()


def test_every_file_of_the_index_is_missed(tmp_path: Path, index: Path) -> None:
    for name in sorted(path.name for path in (index / BM25).iterdir()):
        for size in (None, 0, 0.5):
            copy = shutil.copytree(index, tmp_path / f"{name}-{size}")
            path = copy / BM25 / name
            if size is None:
                path.unlink()
            else:
                os.truncate(path, int(path.stat().st_size * size))
            with pytest.raises(IndexFolderError, match=str(copy)):
                KnowledgeBase.open(copy)


def test_a_damaged_picture_is_told(tmp_path: Path, index: Path) -> None:
    copy = shutil.copytree(index, tmp_path / "index")
    content = (copy / IMAGES).read_bytes()
    (copy / IMAGES).write_bytes(bytes(byte ^ 1 for byte in content))
    knowledge_base = KnowledgeBase.open(copy)
    with pytest.raises(DataLoss, match=f"{IMAGES} is damaged at byte"):
        knowledge_base.retrieve("guide dog")
