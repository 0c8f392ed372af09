"""The benchmark of training: it runs, the models are alike in size and work, and the README says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import serving_network, training
from bench.training_peers import DiffusersIF, are_installed
from bench.training_work import Work
from common.unet.unet import UNet

ROOT = Path(__file__).parents[2]
NAMES = {
    "matched": "ours of that size, without neighbors",
    "imagen_pytorch": "imagen-pytorch",
    "diffusers_if": "diffusers, IF's blocks",
    "diffusers_if_attending_once": "the same, attending at 8 x 8 alone",
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "training.json").read_text())


def test_a_small_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "training.json"
    flags = [
        "--tiny",
        "--preset",
        "tiny-64",
        "--rounds",
        "1",
        "--profiled",
        "1",
        "--batch",
        "2",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr(serving_network, "CONVOLUTIONS", ((64, 32, 2),))
    monkeypatch.setattr(training, "SIDE", 32)
    assert training.main() == 0
    figures = json.loads(out.read_text())
    assert set(figures["models"]) == {"with_neighbors", "own_neighbors", "without", "matched"}
    for row in figures["models"].values():
        assert row["gflop_a_step"] == pytest.approx(3 * row["gflop_a_pass"], rel=0.15), "backward is two passes"
        assert row["examples_per_s"] > 0 and 0 < row["convolution_rate_share"] < 1.5
    passes = [figures["models"][name]["gflop_a_pass"] for name in ("without", "with_neighbors", "own_neighbors")]
    assert passes == sorted(passes), "neighbors are work, and less of it where they are shared"
    for shares in figures["where_time_goes"].values():
        assert sum(shares.values()) == pytest.approx(1.0, abs=0.01) and shares["optimizer"] > 0
    assert out.with_suffix(".md").read_text().startswith("| figure | measured | wanted |")


def test_a_step_learns_and_its_work_is_counted() -> None:
    """By hand: a linear layer 8 -> 4 over 16 rows is 2 * 16 * 8 * 4 FLOP, its gradient by the weight as many."""
    model = nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    work = Work(
        model=model,
        forward=lambda: model(x).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        examples=16,
    )
    before = work.forward().detach()
    work.step()
    assert work.forward().detach() < before and all(p.grad is None for p in model.parameters())
    counted = work.figures()
    assert counted["parameters_m"] == round(32e-6, 3)
    big = Work(model=model, forward=work.forward, optimizer=work.optimizer, examples=1)
    big_flop = 2 * 16 * 8 * 4
    assert big.figures()["gflop_a_pass"] == round(big_flop / 1e9, 3)


def test_matched_is_the_peers_size_and_work(measured: dict[str, Any]) -> None:
    ours = measured["models"]["matched"]
    peers = [row for name, row in measured["models"].items() if name.split(",")[0] in training.PEERS]
    assert len(peers) == 2 * len(training.PEERS)
    for row in peers:
        assert row["parameters_m"] == pytest.approx(ours["parameters_m"], rel=0.03)
        assert row["gflop_a_pass"] == pytest.approx(ours["gflop_a_pass"], rel=0.03)
        assert row["gflop_a_step"] == pytest.approx(ours["gflop_a_step"], rel=0.03)
    counted = sum(p.numel() for p in UNet(training.MATCHED).parameters())
    assert counted / 1e6 == pytest.approx(ours["parameters_m"], rel=0.01), (
        "the figures are of another U-Net: measure again"
    )


def test_ratios_are_of_the_faster_layout(measured: dict[str, Any]) -> None:
    models = measured["models"]
    for peer in training.PEERS:
        best = max(models[f"{peer}, {layout}"]["examples_per_s"] for layout in training.LAYOUTS)
        assert measured[f"vs_{peer}"] == round(models["matched"]["examples_per_s"] / best, 3)
    steps = {name: models[name]["step_ms"] for name in ("with_neighbors", "without")}
    assert measured["neighbor_cost"] == pytest.approx(steps["with_neighbors"] / steps["without"], rel=0.01)
    assert measured["convolution_rate_share"] == models["with_neighbors"]["convolution_rate_share"]


def test_the_diffusers_peer_predicts_pictures() -> None:
    peer = DiffusersIF(32, 32, widths=(8, 32, 64, 64), attends=3)
    said = peer(torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))
    assert said.shape == (2, 3, 32, 32)


@pytest.mark.skipif(not are_installed(), reason="make bench-training has not fetched imagen-pytorch")
def test_imagen_pytorch_predicts_pictures() -> None:
    peer = training.PEERS["imagen_pytorch"]()
    text, mask = torch.randn(1, training.TOKENS, training.TEXT_WIDTH), torch.ones(1, training.TOKENS, dtype=torch.bool)
    assert peer(torch.randn(1, 3, 32, 32), torch.rand(1), text, mask).shape == (1, 3, 32, 32)
    assert "torchvision" not in sys.modules


def test_the_readme_says_what_was_measured(measured: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, name in NAMES.items():
        rows = [row for model, row in measured["models"].items() if model.split(",")[0] == key]
        row = max(rows, key=lambda r: r["examples_per_s"])
        ratio = "" if key == "matched" else f"{measured[f'vs_{key}']:.2f}"
        size = f"{row['parameters_m']:.1f} M, {row['gflop_a_pass']:.2f} GFLOP"
        assert (
            f"| {name} | {size} | {row['examples_per_s']:.1f} | {row['convolution_rate_share']:.2f} | {ratio} |"
            in readme
        )
    demo = measured["models"]
    said = f"{demo['with_neighbors']['examples_per_s']:.1f} examples a second with neighbors"
    assert said in readme and f"{demo['without']['examples_per_s']:.1f} without" in readme
    assert f"times {measured['neighbor_cost']:.2f}" in readme
