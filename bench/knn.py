"""`make bench-knn`: pairs a second of KNN-ImageText by the number of workers, and what 50 million pairs would cost.

The retrieval service and its workers share the machine. Writes `results/knn.json` and a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.load import processor_s
from bench.retrieval import serving
from common.corpus import read_manifest
from common.files import write_atomic, write_json
from deploy.local.working_copy import working_copy
from trainer.knn import asked_of
from trainer.knn_shards import read_header

WORKERS = (1, 2)
K = 2  # the paper's
LARGE = 50_000_000  # pairs of the paper's KNN-ImageText
RESULTS = Path(__file__).parent / "results"
_WORKER = (
    "import json, sys, time\nfrom pathlib import Path\nfrom trainer.knn import ask_shard, asked_of\n"
    "from trainer.knn_lookup import Service\n"
    "corpus, folder, address, shards, shard = sys.argv[1:]\n"
    f"asked = asked_of(Path(corpus), knowledge_base='', method='bm25', k={K}, num_shards=int(shards))\n"
    "print('ready', flush=True)\nsys.stdin.readline()\nbefore = time.process_time()\n"
    "ask_shard(Path(corpus), Path(folder), Service(address=address), asked, int(shard), lambda *told: None)\n"
    "print(time.process_time() - before)\n"
)


def main() -> int:
    """Measure a corpus whose pairs a library holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.knn", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/demo/corpus"))
    parser.add_argument("--library", type=Path, default=Path("build/demo/knowledge-bases"))
    parser.add_argument("--out", type=Path, default=RESULTS / "knn.json")
    flags = parser.parse_args()
    with working_copy(flags.library) as data, serving(data) as (address, pid):
        figures: dict[str, Any] = {
            "pairs": read_manifest(flags.corpus).num_pairs,
            "k": K,
            "workers": {str(n): measured(flags.corpus, address, pid, n) for n in WORKERS},
        }
    figures["at_50m"] = at_large(figures, json.loads((RESULTS / "retrieval.json").read_text()))
    figures["machine"] = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    write_json(flags.out, figures)
    write_atomic(flags.out.with_suffix(".md"), table(figures))
    print(table(figures))
    return 0


def measured(corpus: Path, address: str, service_pid: int, workers: int) -> dict[str, float]:
    """Ask all pairs by so many workers at once, each with its shard."""
    with tempfile.TemporaryDirectory(prefix="reimagen-bench-") as folder:
        command = [sys.executable, "-c", _WORKER, str(corpus), folder, address, str(workers)]
        children = [
            subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for i in range(workers)
        ]
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        before, started = processor_s(service_pid), time.perf_counter()
        said = [_answer(child) for child in _begun(children)]
        seconds, spent = time.perf_counter() - started, processor_s(service_pid) - before
        asked = asked_of(corpus, knowledge_base="", method="bm25", k=K, num_shards=workers)
        for shard in range(workers):
            assert read_header(Path(folder) / "knn" / asked.folder_name / f"shard-{shard:05d}.safetensors").last
    return {
        "pairs_per_s": round(asked.num_pairs / seconds, 1),
        "service_cpu_ms": round(1e3 * spent / asked.num_pairs, 3),
        "worker_cpu_ms": round(1e3 * sum(said) / asked.num_pairs, 3),
    }


def _begun(children: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    return children


def _answer(child: subprocess.Popen[str]) -> float:
    out, _ = child.communicate(timeout=600)
    if child.returncode:
        raise RuntimeError(f"a worker ended with status {child.returncode}")
    return float(out)


def at_large(figures: dict[str, Any], retrieval: dict[str, Any]) -> dict[str, Any]:
    """What LARGE pairs in one index cost, by how the service's processor time of a BM25 lookup grew up to 1 M pairs.

    The lower bound goes on with the power law between 100 K and 1 M pairs, the upper one with the straight line.
    """
    cpu = {size: _cpu_ms(retrieval[size]) for size in ("at_100k", "at_1m")}
    exponent = math.log10(cpu["at_1m"] / cpu["at_100k"])
    slope = (cpu["at_1m"] - cpu["at_100k"]) / 9e5
    worker = figures["workers"]["1"]["worker_cpu_ms"]
    lookups = {"least": cpu["at_1m"] * (LARGE / 1e6) ** exponent, "most": cpu["at_1m"] + slope * (LARGE - 1e6)}
    hours = {bound: LARGE * (ms + worker) / 1e3 / 3600 for bound, ms in lookups.items()}
    grown = LARGE / 1e6
    return {
        "service_cpu_ms": {bound: round(ms, 2) for bound, ms in lookups.items()},
        "cpu_hours": {bound: round(value) for bound, value in hours.items()},
        "hours_on_16_cores": {bound: round(value / 16, 1) for bound, value in hours.items()},
        "hours_on_64_cores": {bound: round(value / 64, 1) for bound, value in hours.items()},
        "index_disk_gb": round(retrieval["at_1m"]["disk_mb"] * grown / 1e3),
        "index_own_memory_gb": round(retrieval["at_1m"]["rss_own_mb"] * grown / 1e3),
        "merge_memory_gb": round(LARGE * (8 + 8 + 1 + 8 + 8 + 4 + 8) / 1e9, 1),
    }


def _cpu_ms(size: dict[str, Any]) -> float:
    return next(load["service_cpu_ms"] for load in size["bm25_by_callers"] if load["callers"] == 2)


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = ["| workers | pairs/s | service's CPU, ms a pair | worker's CPU, ms a pair |", "|---|---|---|---|"]
    for workers, row in figures["workers"].items():
        lines.append(f"| {workers} | {row['pairs_per_s']} | {row['service_cpu_ms']} | {row['worker_cpu_ms']} |")
    lines += ["", "| 50 million pairs in one index | least | most |", "|---|---|---|"]
    large = figures["at_50m"]
    for name in ("service_cpu_ms", "cpu_hours", "hours_on_16_cores", "hours_on_64_cores"):
        lines.append(f"| {name} | {large[name]['least']} | {large[name]['most']} |")
    for name in ("index_disk_gb", "index_own_memory_gb", "merge_memory_gb"):
        lines.append(f"| {name} | {large[name]} | {large[name]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
