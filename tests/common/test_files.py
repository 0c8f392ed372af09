"""A reader sees the old content or the new one, whatever breaks on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from common.files import replacing_folder, sha256_file, write_atomic, write_json


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_makes_parents_and_takes_text_or_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", "grün")
    write_atomic(tmp_path / "a" / "c.bin", b"\x00\xff")
    assert everything(tmp_path) == {"a/b.txt": "grün".encode(), "a/c.bin": b"\x00\xff"}
    assert stat.S_IMODE((tmp_path / "a" / "b.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, old: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    before = everything(tmp_path)
    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new" * 1000)
    assert everything(tmp_path) == before


def test_content_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the content leaves an empty file after a power cut."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1])
    write_atomic(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"], "the content, the rename, then the folder's entry"


def test_an_interrupt_cleans_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"x")
    assert not everything(tmp_path)


def test_json_is_readable_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": "Jalapeño", "list": [1, 2]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and "Jalapeño" in text
    assert json.loads(text) == {"name": "Jalapeño", "list": [1, 2]}
    before = everything(tmp_path)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"bad": object()})
    assert everything(tmp_path) == before


def test_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with replacing_folder(tmp_path / "set") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{content.decode()}.bin").write_bytes(content)
    assert everything(tmp_path) == {"set/sub/two.bin": b"two"}, "nothing of the old one, nothing beside it"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_in_the_middle_leaves_the_old_folder(tmp_path: Path, error: type, existing: bool) -> None:
    if existing:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "old").write_bytes(b"old")
    before = sorted(tmp_path.rglob("*"))

    def half() -> None:
        with replacing_folder(tmp_path / "set") as folder:
            (folder / "half").write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error):
        half()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_moved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old").write_bytes(b"old")
    original = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(source).endswith(".part") and Path(target) == tmp_path / "set":
            full_disk()
        original(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"), replacing_folder(tmp_path / "set") as folder:
        (folder / "new").write_bytes(b"new")
    assert everything(tmp_path) == {"set/old": b"old"}


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
