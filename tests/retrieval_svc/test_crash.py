"""kill -9 at random points: nothing acknowledged is lost, nothing half-made is served, both indexes agree.

REIMAGEN_CRASHES says at how many points (`make test-crashes`: 100); a few of them are part of the suite.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import closing
from hashlib import sha256
from pathlib import Path

from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.retrieval import Query
from tests.retrieval_svc.crash_writer import PAIRS, pair

ROOT = Path(__file__).resolve().parents[2]
CRASHES = int(os.environ.get("REIMAGEN_CRASHES", "4"))
OPEN_S = 60.0

State = dict[int, int | None]
"""Number of a pair to the mark of its last change; None: it is not there."""


def killed(folder: Path, seed: int, after_s: float) -> list[str]:
    """What a writer has said when it is killed `after_s` seconds after it has opened the library."""
    command = [sys.executable, "-m", "tests.retrieval_svc.crash_writer", str(folder), str(seed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stderr is not None
        first = writer.stdout.readline()
        threading.Timer(after_s, writer.send_signal, (signal.SIGKILL,)).start()
        said = [first, *writer.stdout]
        trouble = writer.stderr.read()
        assert writer.wait(OPEN_S) == -signal.SIGKILL, trouble
    return said


def applied(state: State, change: dict) -> State:
    """The state after a change."""
    marks = {n: None for n in change["delete"]} if "delete" in change else {n: change["mark"] for n in change["upsert"]}
    return {**state, **marks}


def replayed(state: State, said: list[str]) -> tuple[State, State]:
    """The acknowledged state, and that with the change which was under way."""
    tried = state
    for line in said:
        kind, _, text = line.partition(" ")
        if kind == "try" and text.endswith("\n"):
            tried = applied(state, json.loads(text))
        elif kind == "done":
            state = tried
    return state, tried


def found(knowledge_base: KnowledgeBase) -> State:
    """What the store, the lexical index and the pictures hold; they must agree."""
    knowledge_base.catch_up()
    stored, _ = knowledge_base.page(limit=1000)
    stats = knowledge_base.stats()
    assert stats.num_pairs == stats.num_embeddings == stats.num_indexed_pairs == len(stored)
    assert stats.num_images == len({p.image_sha256 for p in stored}), "no picture is left over, none is missing"
    by_id = {p.pair_id: p for p in stored}
    state: State = {}
    for number in range(PAIRS):
        there = by_id.get(f"p{number}")
        hits = knowledge_base.retrieve(Query(prompt=f"thing{number}", k=5)).neighbors
        assert [n.pair.pair_id for n in hits] == ([f"p{number}"] if there else [])
        if there is None:
            state[number] = None
            continue
        mark = int(there.caption.partition("made")[2])
        whole = knowledge_base.get(f"p{number}", with_image=True)
        assert hits[0].pair.caption == whole.pair.caption == pair(number, mark).caption
        assert hits[0].image == whole.image == pair(number, mark).image
        assert sha256(whole.image).hexdigest() == there.image_sha256
        state[number] = mark
    return state


def test_killed_at_random_points(tmp_path: Path) -> None:
    rng = random.Random(7)
    state: State = dict.fromkeys(range(PAIRS))
    num_changes = 0
    for crash in range(1, CRASHES + 1):
        said = killed(tmp_path, crash, rng.uniform(0.0, 1.2))
        acknowledged, tried = replayed(state, said)
        num_changes += sum(line.startswith("done") for line in said)
        with closing(Library.open(tmp_path, embedder=None)) as library:
            there = found(library.get("kb"))
        for number in range(PAIRS):
            assert there[number] in (acknowledged[number], tried[number]), f"crash {crash}: pair {number}"
        state = there
    assert num_changes > CRASHES, "it was killed while it worked"
