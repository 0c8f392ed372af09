"""Pictures in a folder that two replicas write to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from common.service.errors import DataLoss
from retrieval_svc.shared_images import SharedImageStore

IMAGE = b"a picture"
NAME = hashlib.sha256(IMAGE).hexdigest()


def used_after(*answers: bool) -> tuple[list[bool], Callable[[Sequence[str]], set[str]]]:
    """Whether the picture has a pair, as it is told time after time."""
    left = list(answers)

    def in_use(contents: Sequence[str]) -> set[str]:
        return set(contents) if left.pop(0) else set()

    return left, in_use


def test_what_nobody_has_is_unlinked(tmp_path: Path) -> None:
    one, other = SharedImageStore(tmp_path, writer="one"), SharedImageStore(tmp_path, writer="other")
    one.put(IMAGE)
    assert other.read(NAME) == IMAGE and other.num_images == 1
    other.note_maybe_unused([NAME])
    assert one.sweep(lambda contents: set()) == 0, "notes are each replica's own"
    _, in_use = used_after(False, False)
    assert other.sweep(in_use) == 1
    assert one.num_images == 0
    with pytest.raises(DataLoss, match="is missing"):
        one.read(NAME)


def test_a_picture_that_gets_a_pair_meanwhile_is_put_back(tmp_path: Path) -> None:
    store = SharedImageStore(tmp_path, writer="one")
    store.put(IMAGE)
    store.note_maybe_unused([NAME])
    left, in_use = used_after(False, True)
    assert store.sweep(in_use) == 0 and left == []
    assert store.read(NAME) == IMAGE


def test_a_picture_that_was_unlinked_meanwhile_is_written_again(tmp_path: Path) -> None:
    """Another replica asked twice before this one's pair was stored."""
    one, other = SharedImageStore(tmp_path, writer="one"), SharedImageStore(tmp_path, writer="other")
    one.put_all([IMAGE])
    other.note_maybe_unused([NAME])
    other.sweep(lambda contents: set())
    one.confirm([IMAGE])
    assert other.read(NAME) == IMAGE


def test_a_replica_that_was_killed_between_puts_back_when_it_returns(tmp_path: Path) -> None:
    store = SharedImageStore(tmp_path, writer="one")
    store.put(IMAGE)
    store.note_maybe_unused([NAME])
    with pytest.raises(KeyboardInterrupt):
        store.sweep(_dies_the_second_time())
    again = SharedImageStore(tmp_path, writer="one")
    assert again.read(NAME) == IMAGE
    assert again.sweep(lambda contents: set()) == 1, "it is noted still"


def _dies_the_second_time() -> Callable[[Sequence[str]], set[str]]:
    asked = iter([set()])

    def in_use(contents: Sequence[str]) -> set[str]:
        for answer in asked:
            return answer
        raise KeyboardInterrupt

    return in_use


def test_two_writers_and_a_reader_never_lose_a_picture_that_has_a_pair(tmp_path: Path) -> None:
    """One stores the pair again and again, the other deletes it: after each storing the picture is there."""
    storing, deleting = SharedImageStore(tmp_path, writer="one"), SharedImageStore(tmp_path, writer="other")
    has_pair, stop = threading.Event(), threading.Event()
    missing: list[int] = []

    def sweep_always() -> None:
        while not stop.is_set():
            deleting.note_maybe_unused([NAME])
            deleting.sweep(lambda contents: set(contents) if has_pair.is_set() else set())

    sweeping = threading.Thread(target=sweep_always)
    sweeping.start()
    try:
        for number in range(60):
            storing.put_all([IMAGE])
            has_pair.set()
            storing.confirm([IMAGE])
            try:
                storing.read(NAME)
            except DataLoss:
                missing.append(number)
            has_pair.clear()
    finally:
        stop.set()
        sweeping.join()
    assert not missing
