"""`make bench-retrieval`: the retrieval service at 10 K, 100 K and 1 M pairs, beside what else one could use.

Everything is measured in one run on one machine; the claims are the ratios. Writes `results/retrieval.json` and a table.
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
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from tqdm import tqdm

from bench.load import measure, request_of
from bench.peers import bm25_peers, exact_numpy
from bench.synthetic import EMBEDDING_SIZE, Corpus, Question
from common.files import write_atomic, write_json
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair, PairFilter

NAME = "bench"
K = 10
BATCH = 1024
METHODS = {"bm25": pb.METHOD_BM25, "clip": pb.METHOD_CLIP, "hybrid": pb.METHOD_HYBRID}
SIZES = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1m": 1_000_000}
RECALL_QUESTIONS = 200
READY_S = 300.0


def main() -> int:
    """Run the sizes asked for; keeps the figures of the others."""
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10k", "100k", "1m"])
    parser.add_argument("--seconds", type=float, default=15.0, help="of load for each method and number of callers")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval.json")
    flags = parser.parse_args()
    figures: dict[str, Any] = json.loads(flags.out.read_text()) if flags.out.is_file() else {}
    for size in flags.sizes:
        with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder:
            figures[f"at_{size}"] = run(Path(folder), SIZES[size], callers=flags.callers, seconds=flags.seconds)
        figures["machine"] = {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        }
        write_json(flags.out, figures)
        write_atomic(flags.out.with_suffix(".md"), table(figures))
    print(table(figures))
    return 0


def run(folder: Path, count: int, *, callers: int, seconds: float) -> dict[str, Any]:
    """Build, measure within the process and through gRPC, measure the peers."""
    corpus = Corpus(count)
    questions = corpus.questions(2000)
    figures: dict[str, Any] = {"pairs": count, "callers": callers, "k": K}
    entities, embeddings = [], np.empty((count, EMBEDDING_SIZE), np.float32)
    with closing(Library.open(folder / "data", embedder=None)) as library:
        knowledge_base = library.create(NAME, embedding_size=EMBEDDING_SIZE)
        started = time.perf_counter()
        with tqdm(desc=f"{count:,} pairs", total=count, disable=None) as bar:
            for block in corpus.blocks():
                embeddings[block.first : block.first + len(block.entities)] = block.embeddings
                entities += block.entities
                for at in range(0, len(block.entities), BATCH):
                    knowledge_base.upsert(_pairs(block.first, block.entities, block.embeddings, at))
                bar.update(len(block.entities))
        knowledge_base.catch_up()
        figures["build_pairs_per_s"] = round(count / (time.perf_counter() - started), 1)
        started = time.perf_counter()
        knowledge_base.optimize()
        figures["optimize_s"] = round(time.perf_counter() - started, 1)
        figures["disk_mb"] = round(knowledge_base.stats().disk_bytes / 1e6, 1)
        figures["vector_recall_at_10"] = _recall(knowledge_base.store, questions[:RECALL_QUESTIONS])
    with _serving(folder) as (address, pid):
        for name, method in METHODS.items():
            requests = [request_of(question, method, NAME, K) for question in questions]
            one = measure(address, requests, callers=1, seconds=seconds / 3)
            many = measure(address, requests, callers=callers, seconds=seconds)
            figures |= {f"{name}_p50_ms": one.p50_ms, f"{name}_p99_ms": one.p99_ms, f"{name}_qps": many.qps}
            figures[f"{name}_loaded"] = asdict(many)
        figures["rss_mb"] = _rss_mb(pid)
    figures["peers"] = bm25_peers(entities, questions, K) | {"exact_numpy": exact_numpy(embeddings, questions, K)}
    return figures


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


def _recall(store: Any, questions: list[Question]) -> float:
    """Share of the ten truly nearest that the index finds (exact search is the oracle)."""
    shares = []
    for question in questions:
        found, true = (
            {s.pair.pair_id for s in store.nearest(question.embedding, limit=K, filter=PairFilter(), exact=exact)}
            for exact in (False, True)
        )
        shares.append(len(found & true) / K)
    return round(float(np.mean(shares)), 4)


@contextmanager
def _serving(folder: Path):
    """(address, process id) of the service over the data folder."""
    address = f"unix:{folder}/retrieval.sock"
    command = [sys.executable, "-m", "retrieval_svc", "serve", f"--data={folder / 'data'}", f"--address={address}"]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen([*command, "--log-level=warning"], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert child.stdout is not None
            if not child.stdout.readline().startswith("ready"):
                raise RuntimeError(f"the service did not start: {(folder / 'log').read_text()[-500:]}")
            yield address, child.pid
        finally:
            child.terminate()
            child.wait(READY_S)


def _rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e3, 1)


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    sizes = [size for size in SIZES if f"at_{size}" in figures]
    rows = ["build_pairs_per_s", "optimize_s", "disk_mb", "rss_mb", "vector_recall_at_10"]
    rows += [f"{name}_{what}" for name in METHODS for what in ("p50_ms", "p99_ms", "qps")]
    lines = ["| figure | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
    lines += [f"| {row} | " + " | ".join(str(figures[f"at_{size}"][row]) for size in sizes) + " |" for row in rows]
    for peer in ("bm25s", "rank_bm25", "exact_numpy"):
        shown = [figures[f"at_{size}"]["peers"].get(peer) for size in sizes]
        cells = [f"{found['p50_ms']} ms, {found['qps']}/s" if found else "-" for found in shown]
        lines.append(f"| {peer} in process, p50 and rate | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
