"""The benchmark of KNN-ImageText: it runs, by one worker and by two at once, and its guide says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import knn
from retrieval_svc.__main__ import main as retrieval
from tests.trainer.shapes import shape_pairs, write_shapes

ROOT = Path(__file__).parents[2]


def test_a_small_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shapes(tmp_path / "corpus", shape_pairs())
    library = tmp_path / "demo" / "library"
    assert retrieval(["import", str(tmp_path / "corpus"), "--knowledge-base", "shapes", "--data", str(library)]) == 0
    out = tmp_path / "knn.json"
    flags = ["--corpus", str(tmp_path / "corpus"), "--library", str(library), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    assert knn.main() == 0
    figures = json.loads(out.read_text())
    assert list(figures["workers"]) == ["1", "2"] and figures["pairs"] == 24
    assert all(row["pairs_per_s"] > 0 and row["worker_cpu_ms"] > 0 for row in figures["workers"].values())
    assert out.with_suffix(".md").read_text().startswith("| workers | pairs/s |")


def test_what_50_million_pairs_cost() -> None:
    """By hand: 1 ms at 100 K and 2 ms at 1 M pairs double with every tenfold, or grow by 10/9 ms a million."""
    loads = {
        size: {"bm25_by_callers": [{"callers": 2, "service_cpu_ms": ms}]}
        for size, ms in (("at_100k", 1.0), ("at_1m", 2.0))
    }
    loads["at_1m"] |= {"disk_mb": 4000.0, "rss_own_mb": 1500.0}
    large = knn.at_large({"workers": {"1": {"worker_cpu_ms": 0.0}}}, loads)
    assert large["service_cpu_ms"] == {
        "least": pytest.approx(2 * 50**0.30103, abs=0.01),
        "most": pytest.approx(2 + 49 * 10 / 9, abs=0.01),
    }
    assert large["cpu_hours"]["most"] == round(50e6 * (2 + 49 * 10 / 9) / 3.6e6)
    assert (large["index_disk_gb"], large["index_own_memory_gb"]) == (200, 75)


def test_the_guide_says_what_was_measured() -> None:
    figures = json.loads((ROOT / "bench" / "results" / "knn.json").read_text())
    guide = " ".join((ROOT / "trainer" / "knn.md").read_text(encoding="utf-8").split())
    for workers, row in figures["workers"].items():
        cpu = f"{row['service_cpu_ms']:.2f} + {row['worker_cpu_ms']:.2f}"
        assert f"| {workers} | {row['pairs_per_s']:.0f} | {cpu} |" in guide
    large = figures["at_50m"]
    assert (
        f"between {large['cpu_hours']['least']} CPU hours" in guide and f"and {large['cpu_hours']['most']} (" in guide
    )
    assert f"takes {large['index_disk_gb']} GB of disk and {large['index_own_memory_gb']} GB of memory" in guide
    hours = [large[f"hours_on_{cores}_cores"] for cores in (16, 64)]
    assert f"{hours[0]['least']:.0f} to {hours[0]['most']:.0f} hours" in guide
    assert f"on 64 cores {hours[1]['least']:.1f} to {hours[1]['most']:.0f}" in guide
