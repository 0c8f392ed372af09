"""The embedder in a process of its own: loading, answering, dying, coming back. The model itself is a fake."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.service.errors import Unavailable
from retrieval_svc import worker_embedder
from retrieval_svc.worker_embedder import WorkerEmbedder
from tests.retrieval_svc.fake_clip_worker import SIZE, hashed

FAKE = (sys.executable, "-m", "tests.retrieval_svc.fake_clip_worker")
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has ended is started again soon."""
    monkeypatch.setattr(worker_embedder, "_FIRST_PAUSE_S", 0.05)


@pytest.fixture
def embedder() -> Iterator[WorkerEmbedder]:
    """One that is loaded."""
    with closing(WorkerEmbedder("any", command=FAKE)) as loaded:
        loaded.wait_loaded(WAIT_S)
        yield loaded


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_texts_and_pictures(embedder: WorkerEmbedder) -> None:
    assert (embedder.name, embedder.size, embedder.image_side) == ("fake", SIZE, 32)
    np.testing.assert_array_equal(embedder.texts(["a", "b"]), [hashed(b"a"), hashed(b"b")])
    pictures = [np.full((2, 3, 3), 7, np.uint8), np.zeros((4, 1, 3), np.uint8)]
    np.testing.assert_array_equal(embedder.images(pictures), [hashed(p.tobytes()) for p in pictures])


def test_from_many_threads_everyone_gets_his_own(embedder: WorkerEmbedder) -> None:
    def ask(number: int) -> bool:
        texts = [f"text {number} {part}" for part in range(number % 3 + 1)]
        return bool((embedder.texts(texts) == [hashed(text.encode()) for text in texts]).all())

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_until_it_is_loaded_it_says_so(tmp_path: Path) -> None:
    with closing(WorkerEmbedder(f"when:{tmp_path}/go", command=FAKE)) as embedder:
        for ask in (lambda: embedder.name, lambda: embedder.texts(["a"])):
            with pytest.raises(Unavailable, match="is loading") as caught:
                ask()
            assert (caught.value.retry_after_s, caught.value.reason) == (2.0, "MODEL_LOADING")
        (tmp_path / "go").touch()
        embedder.wait_loaded(WAIT_S)
        assert embedder.texts(["a"]).shape == (1, SIZE)


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    with closing(WorkerEmbedder("failed", command=FAKE)) as embedder, pytest.raises(Unavailable, match="no such model"):
        embedder.wait_loaded(WAIT_S)
    with (
        closing(WorkerEmbedder("silent", command=FAKE)) as embedder,
        pytest.raises(Unavailable, match="its process ended"),
    ):
        embedder.wait_loaded(WAIT_S)


def test_a_bad_batch_harms_nobody_else(embedder: WorkerEmbedder) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        embedder.texts(["fail"])
    assert embedder.texts(["a"]).shape == (1, SIZE)


def test_a_worker_that_dies_is_replaced(embedder: WorkerEmbedder) -> None:
    with pytest.raises(Unavailable) as caught:
        embedder.texts(["die"])
    assert caught.value.reason == "MODEL_LOST"
    assert embedder.name == "fake", "what it is stays known"

    def answers() -> bool:
        try:
            return embedder.texts(["a"]).shape == (1, SIZE)
        except Unavailable:
            return False

    _until(answers)


def test_the_worker_ends_with_its_service() -> None:
    """However that ends: the socket tells it."""
    script = (
        "import sys, time\n"
        "from retrieval_svc.worker_embedder import WorkerEmbedder\n"
        "embedder = WorkerEmbedder('any', command=sys.argv[1:])\n"
        "embedder.wait_loaded(20)\n"
        "print(embedder._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, *FAKE], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        worker = Path(f"/proc/{int(service.stdout.readline())}")
        assert worker.exists()
        service.kill()
    _until(lambda: not worker.exists() or (worker / "stat").read_text().rpartition(")")[2].split()[0] == "Z")
