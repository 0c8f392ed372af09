"""Files of a command: all or none, whatever the disk says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from client.outputs import check_folder, write_outputs

FILES = {"image-7.png": b"picture", "stage-64.png": b"stage", "neighbors.png": b"sheet", "record.json": b"{}"}


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert write_outputs(out, FILES) == [out / name for name in FILES]
    assert content(out) == FILES


def test_companions_of_an_earlier_picture_go_and_pictures_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_outputs(tmp_path, FILES)
    companions = ("stage-64.png", "neighbors.png", "record.json", "never.png")
    write_outputs(tmp_path, {"image-8.png": b"other", "record.json": b"[]"}, companions=companions)
    assert content(tmp_path) == {
        "notes.txt": b"mine",
        "image-7.png": b"picture",
        "image-8.png": b"other",
        "record.json": b"[]",
    }


def test_a_disk_simulated_as_full_by_a_patched_fsync_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_outputs(out, FILES)
    real_fsync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as caught:
        write_outputs(out, {name: b"new" for name in FILES})
    assert caught.value.filename == str(out / "neighbors.png")
    assert content(out) == FILES
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        write_outputs(tmp_path / "new", FILES)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_leaves_everything_as_it_was(small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("mounting a file system is not permitted here")
    write_outputs(small_disk, FILES)
    with pytest.raises(OSError, match="No space left") as caught:
        write_outputs(small_disk, {"image-8.png": bytes(1 << 20), "record.json": b"[]"})
    assert caught.value.filename == str(small_disk / "image-8.png")
    assert content(small_disk) == FILES


def test_a_folder_that_cannot_be_is_told_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError):
            check_folder(path)
    check_folder(tmp_path / "not" / "yet")


def test_a_folder_simulated_as_read_only_by_a_patched_access_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError) as caught:
        check_folder(tmp_path / "out")
    assert caught.value.filename == str(tmp_path)
