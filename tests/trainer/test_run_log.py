"""What the service reads of a run's log: whole lines, once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.run_folder import cut_log
from trainer.service.run_log import CHUNK_BYTES, LogTail, ProgressReader


def test_lines_are_read_once_whole_and_from_the_start_where_the_log_was_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    tail = LogTail(tmp_path)
    assert tail.read() == []
    line = {"time": 1.0, "kind": "train", "side": 16, "examples": 8, "loss": float("nan"), "note": "text"}
    log.write_text(json.dumps({"step": 1} | line) + "\n" + '{"step": 2, "ti')
    (first,) = tail.read()
    assert (first.step, first.kind, list(first.values)) == (1, "train", ["loss"])
    assert tail.read() == []
    with log.open("a") as stream:
        stream.write('me": 2.0, "kind": "held_out", "examples": 16, "full": 0.5}\nno line of ours\n')
    assert [(found.step, found.values) for found in tail.read()] == [(2, {"full": 0.5})]
    log.write_text(json.dumps({"step": 3} | line) + "\n")
    assert [found.step for found in tail.read()] == [3]


@pytest.mark.parametrize("again", [1, 2, 5])
def test_a_log_that_is_cut_and_written_on_is_told_without_what_was_told(again: int, tmp_path: Path) -> None:
    """By a run that goes on from an earlier state, to before where it was, just there and beyond, before we look."""
    log, tail = tmp_path / "log.jsonl", LogTail(tmp_path)
    lines = [json.dumps({"time": t, "kind": "train", "step": t, "examples": 8, "loss": 0.1}) + "\n" for t in range(9)]
    log.write_text("".join(lines[:6]))
    assert [found.step for found in tail.read()] == list(range(6))
    dropped = cut_log(tmp_path, 3)
    assert dropped == 2 and log.read_text() == "".join(lines[:4])
    with log.open("a") as stream:
        stream.writelines(line.replace('"time": ', '"time": 10') for line in lines[4 : 4 + again])
    assert [(found.step, found.time_s) for found in tail.read()] == [(t, 100 + t) for t in range(4, min(9, 4 + again))]
    with log.open("a") as stream:
        stream.write(lines[8])
    assert [(found.step, found.time_s) for found in tail.read()] == [(8, 8.0)] and tail.read() == []


def test_a_log_is_cut_where_it_tells_of_what_is_lost(tmp_path: Path) -> None:
    assert cut_log(tmp_path, None) == 0, "there is none"
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n{"step": 2}\n{"ste')
    assert cut_log(tmp_path, 4) == 0
    assert cut_log(tmp_path, 2) == 3 and log.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    for name in ("log-1.jsonl", "log-2.jsonl"):
        before = log.read_text()
        assert cut_log(tmp_path, None) == 3 and not log.exists()
        assert (tmp_path / name).read_text() == before, "no line is lost, and no earlier log"
        log.write_text(before)


def test_a_long_log_comes_in_parts(tmp_path: Path) -> None:
    line = json.dumps({"time": 1.0, "kind": "train", "examples": 8, "loss": 0.1, "step": 1}) + "\n"
    num = 2 * CHUNK_BYTES // len(line)
    (tmp_path / "log.jsonl").write_text(line * num)
    tail, parts = LogTail(tmp_path), []
    while found := tail.read():
        parts.append(len(found))
    assert sum(parts) == num and len(parts) >= 2


def test_progress_is_the_newest_line_with_the_newest_training_figures(tmp_path: Path) -> None:
    reader = ProgressReader()
    assert reader.read(tmp_path) is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "time": 1, "kind": "held_out", "examples": 8, "full": 1}\n')
    found = reader.read(tmp_path)
    assert found is not None and (found.step, found.loss, found.examples_per_second) == (1, None, 0.0)
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 2, "time": 2, "kind": "train", "examples": 16, "loss": 0.25, "examples_per_s": 4}\n')
        stream.write('{"step": 3, "time": 3, "kind": "held_out", "examples": 24, "full": 1}\n')
    found = reader.read(tmp_path)
    assert found is not None and (found.step, found.examples, found.loss, found.examples_per_second) == (
        3,
        24,
        0.25,
        4.0,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "Infinity"),
        ("step", "-1"),
        ("step", str(1 << 63)),
        ("examples", "1e999"),
        ("loss", "1" + "0" * 400),
        ("time", "NaN"),
        ("time", "1e300"),
        ("kind", '"\\ud800"'),
        ("kind", "[" * 100_000),
    ],
)
def test_a_line_that_no_message_can_hold_is_passed_over(field: str, value: str, tmp_path: Path) -> None:
    """Others can write where runs do; one such line must not hide a run, or all of them."""
    line = {"time": "1.0", "kind": '"train"', "step": "1", "examples": "8", "loss": "0.5"}
    texts = [
        "{" + ", ".join(f'"{name}": {text}' for name, text in each.items()) + "}"
        for each in (line, line | {field: value})
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(texts) + "\n")
    assert [found.step for found in LogTail(tmp_path).read()] == [1]
    assert (found := ProgressReader().read(tmp_path)) is None or found.step == 1
    cut_log(tmp_path, 1)
