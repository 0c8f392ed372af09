"""The model card says what was measured, of the weights that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.checkpoint import load_stage
from common.stages import STAGES

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "evaluation" / "results" / "demo.json").read_text())
CARD = (ROOT / "weights" / "README.md").read_text()
MAX_BYTES = 30 * 2**20


def test_the_card_gives_the_measured_figures() -> None:
    said = {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.-]+) \|$", CARD, re.MULTILINE)}
    assert said == {name: value for name, value in FIGURES.items() if name != "seconds"}


def test_the_figures_are_of_these_weights() -> None:
    for spec in STAGES:
        trained = load_stage(ROOT / "weights", spec.size).trained
        assert FIGURES[f"examples_{spec.size}"] == trained["examples"]


def test_the_weights_fit_their_budget() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "weights").iterdir()) <= MAX_BYTES
