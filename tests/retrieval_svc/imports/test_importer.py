"""The import as a whole: order, batches, resuming, and what one bad record does to the others (nothing)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retrieval_svc.imports.formats import open_source
from retrieval_svc.imports.importer import run_import
from retrieval_svc.imports.records import Options, Rejected, Source
from retrieval_svc.imports.report import Journal
from retrieval_svc.imports.sinks import BatchRefused
from retrieval_svc.pairs import NewPair, Upserted
from tests.retrieval_svc.imports.small_sources import (
    NO_OPTIONS,
    MemorySink,
    run,
    write_lines,
    write_pictures,
)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Ten pictures; the fourth row is no JSON, the seventh has no picture, the eighth is a second of the first's key."""
    folder = write_pictures(tmp_path / "ten", [f"{n}.png" for n in range(10) if n != 6])
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}"} for n in range(10)]
    rows[7] = {"file_name": "0.png", "text": "again"}
    lines = [json.dumps(row) for row in rows]
    lines[3] = "{"
    (folder / "3.png").unlink()
    (folder / "7.png").unlink()
    write_lines(folder / "metadata.jsonl", lines)
    return open_source(folder, "auto", NO_OPTIONS)


IDS = [f"ten--{n}.png" for n in (0, 1, 2, 4, 5, 8, 9)]
REJECTED = {"metadata unreadable": 1, "picture missing": 1, "key used twice": 1}


def test_everything_is_taken_in_order_and_the_rest_reported(source: Source, tmp_path: Path) -> None:
    sink, report = MemorySink(), tmp_path / "r.jsonl"
    summary = run(source, sink, report, Options(license="CC0", author="Ann", safe=True))
    assert [i for batch in sink.batches for i in batch] == IDS and sink.is_finished
    assert max(map(len, sink.batches)) <= sink.max_pairs
    pair = sink.pairs[IDS[0]]
    assert (pair.caption, pair.license, pair.author, pair.safe) == ("picture 0", "CC0", "Ann", True)
    assert (summary.created, summary.replaced, summary.unchanged, dict(summary.rejected)) == (7, 0, 0, REJECTED)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("metadata.jsonl:4", "metadata unreadable"),
        ("6.png", "picture missing"),
        ("0.png", "key used twice"),
    ]
    written = json.loads((tmp_path / "r.jsonl.summary.json").read_text())
    assert written["rejected"] == REJECTED and written["records"] == 10 and written["created"] == 7
    assert sorted(p.name for p in tmp_path.glob("r.jsonl*")) == ["r.jsonl", "r.jsonl.summary.json"]


def test_a_second_run_changes_nothing(source: Source, tmp_path: Path) -> None:
    sink = MemorySink()
    first = run(source, sink, tmp_path / "r.jsonl")
    report = (tmp_path / "r.jsonl").read_text()
    pairs = dict(sink.pairs)
    second = run(source, sink, tmp_path / "r.jsonl")
    assert (second.created, second.unchanged, second.rejected) == (0, 7, first.rejected)
    assert sink.pairs == pairs and (tmp_path / "r.jsonl").read_text() == report


@pytest.mark.parametrize("resume_file", ["there", "lost", "broken", "of another source"])
@pytest.mark.parametrize("failing_at", [1, 2])
def test_an_interrupted_import_goes_on(source: Source, tmp_path: Path, failing_at: int, resume_file: str) -> None:
    report = tmp_path / "r.jsonl"
    sink = MemorySink(failing_at, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        run(source, sink, report)
    assert not report.exists() and len(sink.pairs) == 4 * (failing_at - 1) and not sink.is_finished
    resume = tmp_path / "r.jsonl.resume.json"
    if resume_file == "lost":
        resume.unlink(missing_ok=True)
    elif resume_file == "broken":
        resume.write_text('{"position": ')
    elif resume_file == "of another source":
        resume.write_text(resume.read_text().replace(source.fingerprint, "x"))
    again = MemorySink()
    again.pairs = sink.pairs
    summary = run(source, again, report)
    assert list(again.pairs) == IDS
    assert summary.num_records == 10 and dict(summary.rejected) == REJECTED
    assert len(report.read_text().splitlines()) == 3, "no line twice, none lost"
    skipped = 4 if resume_file == "there" and failing_at == 2 else 0
    assert sum(map(len, again.batches)) == 7 - skipped
    assert summary.unchanged == 4 * (failing_at - 1) - skipped


@pytest.mark.parametrize("done", [0, 4])
def test_a_kill_between_two_checkpoints_loses_nothing(source: Source, tmp_path: Path, done: int) -> None:
    """The lines so far are longer than the resume file says: what is after it is written again."""
    report, part = tmp_path / "r.jsonl", tmp_path / "r.jsonl.part"
    journal = Journal(report, fingerprint=source.fingerprint)
    if done:
        journal.reject(Rejected(key="metadata.jsonl:4", reason="metadata unreadable"))
    journal.checkpoint(done, now=True)
    with part.open("a") as stream:
        stream.write('{"key": "of a batch whose checkpoint was not written"}\n{"key": "ha' + 2000 * "x")
    summary = run(source, MemorySink(), report)
    assert [json.loads(line)["key"] for line in report.read_text().splitlines()] == [
        "metadata.jsonl:4",
        "6.png",
        "0.png",
    ]
    assert dict(summary.rejected) == REJECTED


class PickySink(MemorySink):
    """Refuses a whole batch for one pair in it."""

    def upsert(self, pairs: list[NewPair]) -> list[Upserted]:  # type: ignore[override]
        if any(pair.caption == "picture 2" for pair in pairs):
            raise BatchRefused("image", "too large")
        return super().upsert(pairs)


def test_a_refused_batch_is_halved_until_the_bad_pair_stands_alone(source: Source, tmp_path: Path) -> None:
    sink = PickySink()
    summary = run(source, sink, tmp_path / "r.jsonl")
    assert [i for batch in sink.batches for i in batch] == [i for i in IDS if i != "ten--2.png"]
    assert summary.rejected["refused: image"] == 1
    assert '"key": "2.png", "reason": "refused: image", "detail": "too large"' in (tmp_path / "r.jsonl").read_text()


def test_batches_are_bounded_in_bytes(source: Source, tmp_path: Path) -> None:
    sink = MemorySink()
    sink.max_bytes = 1
    run(source, sink, tmp_path / "r.jsonl")
    assert all(len(batch) == 1 for batch in sink.batches) and len(sink.batches) == 7


def test_progress_counts_every_record(source: Source, tmp_path: Path) -> None:
    sink = MemorySink(2, OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        run(source, sink, tmp_path / "r.jsonl")
    counts: list[int] = []
    from_there = Journal(tmp_path / "r.jsonl", fingerprint=source.fingerprint)
    assert from_there.position > 0
    run_import(source, MemorySink(), NO_OPTIONS, from_there, counts.append)
    assert sum(counts) == 10 and counts[0] == from_there.resumed_at
