"""Votes on the disk: each whole or not at all, through kills and full disks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from evaluation.rating.votes import Event, RaterFile, Undo, Vote, VotesError, standing


def vote(serial: int, item: str, photorealism: int = 1, **more: object) -> Vote:
    fields: dict[str, object] = {
        "serial": serial,
        "item": item,
        "system": "ours",
        "prompt_id": item,
        "category": "animals",
        "entity": "gray\u2028heron",  # some readers take that for a new line
        "frequent": True,
        "check": None,
        "picture": "ab",
        "seed": 1,
        "photorealism": photorealism,
        "faithfulness": 0,
        "seconds": 1.5,
        "at": "2026-01-02T03:04:05.678Z",
    }
    return Vote(**{**fields, **more})  # type: ignore[arg-type]


def undo(serial: int, item: str) -> Undo:
    return Undo(serial=serial, item=item, at="2026-01-02T03:04:05.678Z")


def reopened(file: RaterFile) -> RaterFile:
    again = RaterFile.open_file(file.path)
    assert again is not None
    return again


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    file = RaterFile.create(tmp_path, "Åda \u2028")
    for event in (vote(0, "x"), undo(1, "x"), vote(2, "x", 0), vote(3, "y")):
        file.append(event)
    again = reopened(file)
    assert (again.rater_id, again.name, again.events) == (file.rater_id, "Åda \u2028", file.events)
    assert [(v.item, v.photorealism) for v in again.votes] == [("x", 0), ("y", 1)] and again.prompts == {"x", "y"}
    assert RaterFile.read(file.path).events == file.events  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("events", "votes", "undone"),
    [
        ([vote(0, "x"), vote(1, "y")], ["x", "y"], []),
        ([vote(0, "x"), vote(1, "y"), undo(2, "y")], ["x"], ["y"]),
        ([vote(0, "x"), vote(1, "y"), undo(2, "y"), undo(3, "x")], [], ["y", "x"]),
        ([vote(0, "x"), vote(1, "y"), undo(2, "y"), undo(3, "x"), vote(4, "x")], ["x"], ["y"]),
        ([vote(0, "x"), vote(1, "y"), vote(2, "x", 0)], ["y", "x"], []),
    ],
)
def test_what_stands(events: list[Event], votes: list[str], undone: list[str]) -> None:
    found, open_again = standing(events)
    assert [v.item for v in found] == votes and open_again == undone


def test_a_line_cut_short_by_a_kill_was_never_acknowledged(tmp_path: Path) -> None:
    file = RaterFile.create(tmp_path, "Ada")
    file.append(vote(0, "x"))
    whole = file.path.read_bytes()
    file.append(vote(1, "y"))
    longer = file.path.read_bytes()
    for cut in (len(whole) + 1, len(whole) + 40, len(longer) - 1):
        file.path.write_bytes(longer[:cut])
        assert [v.item for v in RaterFile.read(file.path).votes] == ["x"]  # type: ignore[union-attr]
        assert file.path.stat().st_size == cut, "a reader changes nothing"
        again = reopened(file)
        assert [v.item for v in again.votes] == ["x"] and file.path.read_bytes() == whole
        again.append(vote(1, "z"))
        assert [v.item for v in reopened(file).votes] == ["x", "z"]


def test_a_rater_whose_first_line_was_cut_short_never_was(tmp_path: Path) -> None:
    file = RaterFile.create(tmp_path, "Ada")
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert RaterFile.read(file.path) is None and file.path.exists()
    assert RaterFile.open_file(file.path) is None and not file.path.exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RaterFile.create(tmp_path, "Ada")
    file.append(vote(0, "x"))
    before = file.path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            file.append(vote(1, "y"))
    assert file.path.read_bytes() == before and len(file.events) == 1
    file.append(vote(1, "y"))
    assert [v.item for v in reopened(file).votes] == ["x", "y"]


def test_a_vote_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RaterFile.create(tmp_path, "Ada")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(file.path.read_bytes()))
    file.append(vote(0, "x"))
    assert synced == [file.path.read_bytes()] and json.loads(synced[0].split(b"\n")[1])["item"] == "x"


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        '{"event": "vote"}',
        '{"event": "undo", "serial": 7, "item": "x", "at": ""}',
        '{"event": "rater", "rater": "a", "name": "b"}',
        json.dumps({"event": "vote", **vars(vote(0, "x", 2))}),
        json.dumps({"event": "vote", **vars(vote(0, "x", check="another"))}),
        json.dumps({"event": "vote", **vars(vote(0, "x")), "more": 1}),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    file = RaterFile.create(tmp_path, "Ada")
    with file.path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(VotesError, match=rf"{file.path}:2 is no event of a rater"):
        RaterFile.open_file(file.path)
