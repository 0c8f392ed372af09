"""Lookups answered by a process of their own: it sees every commit, dies, hangs, comes back, and ends with the service."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb

from common.service.config import ConfigError
from retrieval_svc import bm25, lexical_process
from retrieval_svc.bm25 import TantivyIndex
from retrieval_svc.lexical_process import NUM_CHANNELS, LexicalProcess
from retrieval_svc.pairs import Lookup
from retrieval_svc.settings import RetrievalSettings
from tests.retrieval_svc.bm25_modes import answering, not_here, until
from tests.retrieval_svc.serving import TIMEOUT_S, fill, hosted, make_pairs
from tests.retrieval_svc.test_bm25_live import added, found, removed


@pytest.fixture
def index(tmp_path: Path) -> Iterator[TantivyIndex]:
    """One cat, and a process that answers."""
    with closing(answering(tmp_path / "index")) as opened:
        opened.apply([added("a", "cat", 1)])
        yield opened


def _process(index: TantivyIndex) -> LexicalProcess:
    assert index._process is not None
    return index._process


def _worker(index: TantivyIndex) -> subprocess.Popen[bytes]:
    worker = _process(index)._process
    assert worker is not None
    return worker


def test_what_is_applied_is_seen_at_once_and_what_is_removed_is_not(
    index: TantivyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bm25, "LexicalSearch", not_here)
    for version in range(2, 40, 2):
        index.apply([added("b", "cat", version)])
        assert found(index, "cat") == ["a", "b"]
        index.apply([removed("b", version + 1)])
        assert found(index, "cat") == ["a"]


def test_from_many_threads_while_it_is_written_everyone_gets_his_own(index: TantivyIndex) -> None:
    """Twice as many as there are channels: who finds none free is answered here."""
    index.apply([added(f"p{n}", f"bird{n}", n + 2) for n in range(50)])

    def ask(number: int) -> bool:
        return found(index, f"bird{number % 50}") == [f"p{number % 50}"] and "a" in found(index, "cat")

    with ThreadPoolExecutor(2 * NUM_CHANNELS) as pool:
        answers = pool.map(ask, range(400))
        for version in range(100, 120):
            index.apply([added(f"q{version}", "cat", version)])
        assert all(answers)


def test_a_killed_worker_is_replaced_and_nobody_waits_for_it(
    index: TantivyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _worker(index)
    first.kill()
    assert found(index, "cat") == ["a"]
    index.apply([added("b", "cat", 2)])
    assert found(index, "cat") == ["a", "b"]
    until(lambda: _process(index).is_answering and _worker(index) is not first)
    monkeypatch.setattr(bm25, "LexicalSearch", not_here)
    assert found(index, "cat") == ["a", "b"], "it has seen what was written while there was none"


def test_commits_while_a_worker_starts_are_seen_by_it(index: TantivyIndex) -> None:
    for round_ in range(3):
        first = _worker(index)
        first.kill()
        until(lambda first=first: _worker(index) is not first)
        version = 1000 * (round_ + 1)
        while not _process(index).is_answering:
            version += 1
            index.apply([added("b", f"dog{version}", version)])
        assert found(index, f"dog{version}") == ["b"]


def test_a_worker_that_hangs_is_given_up(index: TantivyIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical_process, "ANSWER_TIMEOUT_S", 1)
    first = _worker(index)
    first.kill()
    until(lambda: _worker(index) is not first and _process(index).is_answering)
    second = _worker(index)
    second.send_signal(signal.SIGSTOP)
    assert found(index, "cat") == ["a"]
    index.apply([added("b", "cat", 2)])
    assert found(index, "cat") == ["a", "b"]
    assert second.wait(20) == -signal.SIGKILL


def test_what_it_fails_to_answer_is_answered_here(index: TantivyIndex) -> None:
    assert _process(index).search(Lookup(entity="cat", limit=-1)) == []
    assert _process(index).search(Lookup(entity="cat", limit="many")) is None  # type: ignore[arg-type]
    assert found(index, "cat") == ["a"]


def test_auto_starts_it_when_there_are_pairs_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "AUTO_PROCESS_PAIRS", 3)
    monkeypatch.setattr(bm25.os, "sched_getaffinity", lambda _: {0, 1})
    with closing(TantivyIndex.open(tmp_path / "index", process="auto")) as index:
        index.apply([added("a", "cat", 1), added("b", "cat", 2)])
        assert index._process is None
        index.apply([added("c", "cat", 3)])
        assert index._process is not None
    monkeypatch.setattr(bm25.os, "sched_getaffinity", lambda _: {0})
    with closing(TantivyIndex.open(tmp_path / "index", process="auto")) as index:
        assert index._process is None


def test_it_is_small_and_ends_with_its_index(index: TantivyIndex) -> None:
    worker = Path(f"/proc/{_worker(index).pid}")
    own = next(line for line in (worker / "status").read_text().splitlines() if line.startswith("RssAnon"))
    assert int(own.split()[1]) < 100_000, "kB: no torch, no server"
    started = time.monotonic()
    index.close()
    assert not worker.exists() and time.monotonic() - started < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "lexical-worker" and thread.is_alive()]
    assert found(index, "cat") == ["a"]


def test_it_ends_with_its_service_however_that_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.retrieval_svc.bm25_modes import answering\n"
        "index = answering(Path(sys.argv[1]))\n"
        "print(index._process._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "index")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        worker = Path(f"/proc/{int(service.stdout.readline())}")
        assert worker.exists()
        service.kill()
    until(lambda: not worker.exists() or (worker / "stat").read_text().rpartition(")")[2].split()[0] == "Z")


def test_through_the_service_what_is_stored_is_found_within_a_second_and_what_is_deleted_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[LexicalProcess] = []

    class Noted(LexicalProcess):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            started.append(self)

    monkeypatch.setattr(bm25, "LexicalProcess", Noted)
    with hosted(tmp_path, bm25_process="on") as client:
        fill(client, pairs=make_pairs(("cat",)))
        until(lambda: started and started[0].is_answering)
        for round_ in range(5):
            entity = f"lynx{'abcde'[round_]}"
            pairs = make_pairs((entity,))
            stored = time.monotonic()
            client.bases.UpsertPairs(kb_pb.UpsertPairsRequest(knowledge_base="small", pairs=pairs), timeout=TIMEOUT_S)
            until(lambda entity=entity: len(client.retrieve(entity, k=2).neighbors) == 2)
            assert time.monotonic() - stored < 2, "the promise is 1 s; the machine is busy"
            ids = [pair.pair_id for pair in pairs]
            gone = kb_pb.DeletePairsRequest(knowledge_base="small", pair_ids=ids)
            client.bases.DeletePairs(gone, timeout=TIMEOUT_S)
            assert not client.retrieve(entity, k=2).neighbors
        monkeypatch.setattr(bm25, "LexicalSearch", not_here)
        assert {n.pair_id for n in client.retrieve("cat", k=4).neighbors} == {"noto--cat", "twemoji--cat"}
    assert not started[0].is_answering, "it has ended with its knowledge base"


def test_it_is_of_tantivy() -> None:
    with pytest.raises(ConfigError, match="--bm25-process: on is of tantivy"):
        RetrievalSettings(data=Path("x"), bm25="qdrant", bm25_process="on").check()
