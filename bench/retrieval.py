"""`make bench-retrieval`: the retrieval service at 10 K, 100 K and 1 M pairs, beside what else one could use.

Everything of one size is measured in one run on one machine, the peers included: the claims are the ratios. A library is
built, kept if `--data` says where, and measured through gRPC by callers who share the machine's processors with the service.
Writes `results/retrieval.json` and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from tqdm import tqdm

from bench.load import measure, processes_of, request_of
from bench.peers import bm25_peers, exact_numpy
from bench.synthetic import EMBEDDING_SIZE, Corpus, Question
from common.files import write_atomic, write_json
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair, PairFilter

NAME = "bench"
K = 10
BATCH = 1024
METHODS = {"bm25": pb.METHOD_BM25, "clip": pb.METHOD_CLIP, "hybrid": pb.METHOD_HYBRID}
SIZES = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1m": 1_000_000}
CALLERS = (1, 2, 4)  # at once; the figures in front are those of `HEADLINE`
HEADLINE = 2
NUM_QUESTIONS = 2000
RECALL_QUESTIONS = 200
READY_S = 300.0
_BUILD = "build.json"  # figures of a kept library's build


def main() -> int:
    """Run the sizes asked for; keeps the figures of the others."""
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10k", "100k", "1m"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each method and number of callers")
    parser.add_argument("--data", type=Path, help="keep the libraries here, and measure those that are there already")
    parser.add_argument("--build-only", action="store_true", help="build the libraries in --data, and measure later")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval.json")
    flags = parser.parse_args()
    if flags.build_only and flags.data is None:
        parser.error("--build-only needs --data")
    for size in flags.sizes:
        with _kept(flags.data, size) as folder:
            figures = _built(folder, SIZES[size])
            if not flags.build_only:
                _write(flags.out, size, figures | _measured(folder, SIZES[size], flags.seconds))
    if flags.out.is_file():
        print(table(json.loads(flags.out.read_text())))
    return 0


@contextmanager
def _kept(data: Path | None, size: str) -> Iterator[Path]:
    if data is not None:
        yield data / size
        return
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder:
        yield Path(folder)


def _built(folder: Path, count: int) -> dict[str, Any]:
    """Build the library in `folder` unless it is there; what building took, and what has come of it."""
    if (folder / _BUILD).is_file():
        return json.loads((folder / _BUILD).read_text())
    figures: dict[str, Any] = {"pairs": count}
    corpus = Corpus(count)
    with closing(Library.open(folder / "data", embedder=None)) as library:
        knowledge_base = library.create(NAME, embedding_size=EMBEDDING_SIZE)
        started = time.perf_counter()
        with tqdm(desc=f"{count:,} pairs", total=count, disable=None) as bar:
            for block in corpus.blocks():
                for at in range(0, len(block.entities), BATCH):
                    knowledge_base.upsert(_pairs(block.first, block.entities, block.embeddings, at))
                bar.update(len(block.entities))
        knowledge_base.catch_up()
        figures["build_pairs_per_s"] = round(count / (time.perf_counter() - started), 1)
        started = time.perf_counter()
        knowledge_base.optimize()
        figures["optimize_s"] = round(time.perf_counter() - started, 1)
        figures |= described(knowledge_base, corpus.questions(NUM_QUESTIONS)[:RECALL_QUESTIONS])
    write_json(folder / _BUILD, figures)
    return figures


def described(knowledge_base: KnowledgeBase, questions: list[Question]) -> dict[str, Any]:
    """Size on disk, and the share of the ten truly nearest that the index finds (exact search is the oracle)."""
    shares = []
    for question in questions:
        found, true = (
            {
                hit.pair.pair_id
                for hit in knowledge_base.store.nearest(question.embedding, limit=K, filter=PairFilter(), exact=exact)
            }
            for exact in (False, True)
        )
        shares.append(len(found & true) / K)
    disk_mb = round(knowledge_base.stats().disk_bytes / 1e6, 1)
    return {"disk_mb": disk_mb, "vector_recall_at_10": round(float(np.mean(shares)), 4)}


def _measured(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """The service under load, and the peers."""
    corpus = Corpus(count)
    questions = corpus.questions(NUM_QUESTIONS)
    figures: dict[str, Any] = {"k": K, "callers": HEADLINE}
    with serving(folder / "data") as (address, pid):
        for name, method in METHODS.items():
            requests = [request_of(question, method, NAME, K) for question in questions]
            loads = {
                callers: measure(address, requests, callers=callers, seconds=seconds, service_pid=pid, k=K)
                for callers in CALLERS
            }
            head = loads[HEADLINE]
            figures |= {f"{name}_p50_ms": head.p50_ms, f"{name}_p99_ms": head.p99_ms, f"{name}_qps": head.qps}
            figures[f"{name}_by_callers"] = [asdict(load) for load in loads.values()]
        figures |= _memory(pid)
    blocks = list(corpus.blocks())
    entities = [entity for block in blocks for entity in block.entities]
    embeddings = np.concatenate([block.embeddings for block in blocks])
    del blocks
    figures["peers"] = bm25_peers(entities, questions, K) | {"exact_numpy": exact_numpy(embeddings, questions, K)}
    return figures


def _write(out: Path, size: str, measured: Mapping[str, Any]) -> None:
    figures: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    figures[f"at_{size}"] = measured
    figures["machine"] = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)
    write_atomic(out.with_suffix(".md"), table(figures))


def _pairs(first: int, entities: list[str], embeddings: np.ndarray, at: int) -> list[NewPair]:
    return [
        NewPair(
            pair_id=f"pair-{first + i}",
            caption=f"{entities[i]}, plain style",
            entity=entities[i],
            image_uri=f"https://pictures.example/{first + i}.png",
            license="CC0-1.0",
            source="bench",
            embedding=embeddings[i],
        )
        for i in range(at, min(at + BATCH, len(entities)))
    ]


@contextmanager
def serving(library: Path) -> Iterator[tuple[str, int]]:
    """(address, process id) of the service over a library."""
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder:
        address = f"unix:{folder}/retrieval.sock"
        command = [sys.executable, "-m", "retrieval_svc", "serve", f"--data={library}", f"--address={address}"]
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [*command, "--log-level=warning"], stdout=subprocess.PIPE, stderr=stream, text=True
            )
        try:
            assert child.stdout is not None
            if not child.stdout.readline().startswith("ready"):
                raise RuntimeError(f"the service did not start: {log.read_text()[-500:]}")
            yield address, child.pid
        finally:
            child.terminate()
            child.wait(READY_S)


def _memory(service_pid: int) -> dict[str, float]:
    """What the service has in memory, and how much of it is its own; the rest is files that the system may drop.

    Of its processes together: a part of a file that two of them read counts twice.
    """
    sizes = {"rss_mb": 0.0, "rss_own_mb": 0.0}
    for pid in processes_of(service_pid):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        for name, size in (("rss_mb", status["VmRSS"]), ("rss_own_mb", status["RssAnon"])):
            sizes[name] += int(size.split()[0]) / 1e3
    return {name: round(size, 1) for name, size in sizes.items()}


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    sizes = [size for size in SIZES if f"at_{size}" in figures]
    rows = ["build_pairs_per_s", "optimize_s", "disk_mb", "rss_mb", "rss_own_mb", "vector_recall_at_10"]
    rows += [f"{name}_{what}" for name in METHODS for what in ("p50_ms", "p99_ms", "qps")]
    lines = ["| figure | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
    lines += [f"| {row} | " + " | ".join(str(figures[f"at_{size}"][row]) for size in sizes) + " |" for row in rows]
    for name in METHODS:
        for place, callers in enumerate(CALLERS):
            loads = [figures[f"at_{size}"][f"{name}_by_callers"][place] for size in sizes]
            cells = [
                f"{load['qps']}/s, p99 {load['p99_ms']} ms, CPU {load['service_cpu_ms']} + {load['callers_cpu_ms']} ms"
                for load in loads
            ]
            lines.append(f"| {name}, {callers} at once | " + " | ".join(cells) + " |")
    for peer in ("bm25s", "rank_bm25", "exact_numpy"):
        shown = [figures[f"at_{size}"]["peers"].get(peer) for size in sizes]
        cells = [f"{found['p50_ms']} ms, {found['qps']}/s" if found else "-" for found in shown]
        lines.append(f"| {peer} in process, p50 and rate | " + " | ".join(cells) + " |")
    notes = figures.get("notes", [])  # by hand, of what a run's figures do not tell
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
