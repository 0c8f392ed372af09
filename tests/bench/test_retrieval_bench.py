"""The benchmark of retrieval: it runs, and the README says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import retrieval
from bench.load import request_of
from bench.synthetic import Corpus

ROOT = Path(__file__).parents[2]


def test_a_small_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real service under load, and the real peers; the second run measures the library that the first has kept."""
    out = tmp_path / "results" / "retrieval.json"
    run = ["bench", "--sizes", "1k", "--seconds", "0.1", "--data", str(tmp_path / "kept"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*run, "--build-only"])
    assert retrieval.main() == 0 and not out.exists()
    built = (tmp_path / "kept" / "1k" / "build.json").read_text()
    monkeypatch.setattr(sys, "argv", run)
    assert retrieval.main() == 0
    measured: dict[str, Any] = json.loads(out.read_text())["at_1k"]
    assert json.loads(built).items() <= measured.items()
    for name in ("bm25", "clip", "hybrid"):
        assert measured[f"{name}_qps"] > 0 and measured[f"{name}_p99_ms"] >= measured[f"{name}_p50_ms"] > 0
        assert [load["callers"] for load in measured[f"{name}_by_callers"]] == [1, 2, 4]
        assert all(load["callers_cpu_ms"] > 0 for load in measured[f"{name}_by_callers"])
    assert measured["vector_recall_at_10"] >= 0.95 and measured["rss_mb"] > measured["rss_own_mb"] > 0
    assert measured["peers"].keys() == {"bm25s", "rank_bm25", "exact_numpy"}
    assert out.with_suffix(".md").read_text().startswith("| figure | 1k |")


def test_an_answer_without_its_neighbors_stops_the_run(tmp_path: Path) -> None:
    retrieval._built(tmp_path, 1000)
    (question,) = Corpus(1000).questions(1)
    with retrieval.serving(tmp_path / "data") as (address, pid):
        requests = [request_of(question, retrieval.METHODS["clip"], retrieval.NAME, 10)]
        with pytest.raises(ValueError, match="has 10 of 11 neighbors"):
            retrieval.measure(address, requests, callers=1, seconds=0.1, service_pid=pid, k=11)


def test_the_readme_says_what_was_measured() -> None:
    figures = json.loads((ROOT / "bench" / "results" / "retrieval.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for size, name in (("at_10k", "10,000"), ("at_100k", "100,000"), ("at_1m", "1,000,000")):
        at = figures[size]
        cells = [
            f"{at[f'{method}_qps']:.0f}/s, {at[f'{method}_p99_ms']:.1f} ms" for method in ("hybrid", "bm25", "clip")
        ]
        assert f"| {name} | {' | '.join(cells)} | {at['vector_recall_at_10']:.3f} |" in readme
