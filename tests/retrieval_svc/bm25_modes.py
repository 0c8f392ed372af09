"""The tests of Tantivy's index once more, with a process of its own that answers lookups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retrieval_svc import bm25
from retrieval_svc.bm25 import Bm25Process, TantivyIndex

WAIT_S = 20.0


def until(condition: Callable[[], object]) -> None:
    """Wait for it."""
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)


def answering(folder: Path) -> TantivyIndex:
    """The index in `folder`, and a process that answers."""
    index = TantivyIndex.open(folder, process="on")
    process = index._process
    assert process is not None
    until(lambda: process.is_answering)
    return index


def not_here(*_: object) -> None:
    """In the place of `LexicalSearch` in the service's process."""
    raise AssertionError("searched in the service's process")


@pytest.fixture(params=["off", "on"], autouse=True)
def searched_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """off: in this process. on: in another one, and nothing is searched in this."""
    opened: list[TantivyIndex] = []
    real = TantivyIndex.open

    def open_index(folder: Path, *, process: Bm25Process = "off") -> TantivyIndex:
        index = real(folder, process=request.param)
        opened.append(index)
        if index._process is not None:
            until(lambda: index._process is not None and index._process.is_answering)
        return index

    monkeypatch.setattr(TantivyIndex, "open", open_index)
    if request.param == "on":
        monkeypatch.setattr(bm25, "LexicalSearch", not_here)
    yield
    for index in opened:
        index.close()
