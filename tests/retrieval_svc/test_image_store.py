"""Pictures are there as a whole or not at all, and go when nobody has them; with crashes and a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.service.errors import DataLoss
from retrieval_svc import image_store
from retrieval_svc.image_store import ImageStore


def sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def files(folder: Path) -> set[str]:
    """Every file of the store, by its path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def used_by(*images: bytes) -> Callable[[Sequence[str]], set[str]]:
    return lambda contents: {sha256(image) for image in images} & set(contents)


def test_a_picture_is_stored_once_under_its_hash(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    name = store.put(b"one")
    assert store.put(b"one") == name == sha256(b"one")
    assert files(tmp_path / "images") == {f"{name[:2]}/{name[2:]}"}
    assert store.read(name) == b"one"
    assert ImageStore(tmp_path / "images").read(name) == b"one"


def test_totals_are_kept_up_to_date(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    store.put(b"before")
    assert (store.num_images, store.num_bytes) == (1, 6)
    store.put(b"after that")
    store.put(b"after that")
    assert (store.num_images, store.num_bytes) == (2, 16)
    store.note_maybe_unused([sha256(b"before")])
    store.sweep(used_by())
    assert (store.num_images, store.num_bytes) == (1, 10)
    again = ImageStore(tmp_path)
    assert (again.num_images, again.num_bytes) == (1, 10)


def test_a_missing_or_altered_picture_is_data_loss_and_storing_it_again_heals(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    name = store.put(b"picture")
    path = tmp_path / name[:2] / name[2:]
    for damaged in (b"", b"pictur", b"pictura"):
        path.write_bytes(damaged)
        with pytest.raises(DataLoss, match=f"{name} is damaged"):
            store.read(name)
        store.put(b"picture")
        assert store.read(name) == b"picture"
    assert (store.num_images, store.num_bytes) == (1, 7)
    path.unlink()
    with pytest.raises(DataLoss, match=f"{name} is missing"):
        store.read(name)
    for strange in ("", "../../etc/passwd", "http://x/a.png", name.upper(), name + "\n"):
        with pytest.raises(DataLoss, match="is not a sha256"):
            store.read(strange)


def test_what_was_noted_and_nobody_has_is_swept(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    names = [store.put(image) for image in (b"used", b"unused", b"never noted")]
    store.note_maybe_unused([*names[:2], sha256(b"never put"), "http://x/a.png"])
    store = ImageStore(tmp_path)  # notes outlive the process
    asked: list[str] = []

    def in_use(contents: Sequence[str]) -> set[str]:
        asked.extend(contents)
        return {names[0]}

    assert store.sweep(in_use) == 1
    assert asked == [*names[:2], sha256(b"never put")]
    assert files(tmp_path) == {f"{name[:2]}/{name[2:]}" for name in (names[0], names[2])}
    assert store.sweep(in_use) == 0 and len(asked) == 3, "the notes are forgotten"
    store.note_maybe_unused([])
    assert store.sweep(in_use) == 0 and len(asked) == 3


def test_many_notes_are_asked_for_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "_BATCH", 3)
    store = ImageStore(tmp_path)
    images = [b"%d" % n for n in range(8)]
    store.note_maybe_unused([store.put(image) for image in images])
    sizes: list[int] = []

    def in_use(contents: Sequence[str]) -> set[str]:
        sizes.append(len(contents))
        return used_by(*images[::2])(contents)

    assert store.sweep(in_use) == 4
    assert sizes == [3, 3, 2]


def test_what_is_noted_during_a_sweep_is_not_forgotten(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    first, later = store.put(b"first"), store.put(b"later")
    store.note_maybe_unused([first])

    def in_use(_: Sequence[str]) -> set[str]:
        store.note_maybe_unused([later])
        return set()

    assert store.sweep(in_use) == 1
    assert store.sweep(used_by()) == 1
    assert store.num_images == 0


def test_a_sweep_that_fails_is_done_again(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    store.note_maybe_unused([store.put(b"unused")])

    def unavailable(_: Sequence[str]) -> set[str]:
        raise OSError(errno.EIO, "the store of pairs has gone")

    with pytest.raises(OSError, match="has gone"):
        store.sweep(unavailable)
    assert store.num_images == 1
    assert store.sweep(used_by()) == 1


def test_a_note_that_a_crash_cut_short_spoils_no_other(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    one, two = store.put(b"one"), store.put(b"two")
    store.note_maybe_unused([one])
    with (tmp_path / "maybe-unused").open("ab") as stream:
        stream.write(b"\n0123\xff")
    store.note_maybe_unused([two])
    assert store.sweep(used_by()) == 2


def test_two_threads_put_the_same_pictures(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    images = [b"picture %d" % n * 1000 for n in range(20)]
    start = threading.Barrier(4)
    names: list[list[str]] = []

    def put() -> None:
        start.wait()
        names.append([store.put(image) for image in images])

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert store.num_images <= 20
    for thread in threads:
        thread.join()
    assert names == [[sha256(image) for image in images]] * 4
    assert [store.read(name) for name in names[0]] == images
    assert len(files(tmp_path)) == store.num_images == 20


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = ImageStore(tmp_path)
    store.put(b"before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(image_store.os, "fdopen", full)
        else:
            patched.setattr(image_store.os, call, full)
        with pytest.raises(OSError, match="No space left"):
            store.put(b"picture")
    assert len(files(tmp_path)) == store.num_images == 1
    assert store.read(store.put(b"picture")) == b"picture"


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 10,000 bytes."""
    script = f"""
import resource, signal
from pathlib import Path
from retrieval_svc.image_store import ImageStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ImageStore(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    store.put(bytes(20_000))
except OSError as error:
    print(error.errno)
print(store.num_images, store.put(bytes(5_000)) == {sha256(bytes(5000))!r}, store.num_images)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.split() == [str(errno.EFBIG), "0", "True", "1"], ran.stderr
    assert len(files(tmp_path)) == 1


def test_killed_while_it_writes_it_leaves_whole_pictures_only(tmp_path: Path) -> None:
    """SIGKILL in a stream of pictures: what was acknowledged is there, and nothing is half there."""
    script = f"""
from pathlib import Path
from retrieval_svc.image_store import ImageStore
store = ImageStore(Path({str(tmp_path)!r}))
for n in range(100_000):
    print(store.put(b"%d" % n * 20_000), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().strip() for _ in range(30)]
        writer.kill()
        acknowledged += [line.strip() for line in writer.stdout if line.endswith("\n")]
    store = ImageStore(tmp_path)
    there = {name.replace("/", "") for name in files(tmp_path)}
    assert set(acknowledged) <= there and len(there) <= len(acknowledged) + 1
    assert all(len(store.read(name)) >= 20_000 for name in there)
