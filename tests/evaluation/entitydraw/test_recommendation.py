"""What is recommended, where it is known which systems are worse and which are as good."""

from __future__ import annotations

import numpy as np

from evaluation.ablations.recommendation import recommend
from evaluation.ablations.rows import Ablation, Point
from evaluation.entitydraw.figures import figures_of
from evaluation.entitydraw.results import ScoreRow
from evaluation.entitydraw.systems import System

COSTS = {"one": 1.0, "four": 4.0, "other-four": 4.0, "many": 64.0}
ROW = Ablation(
    name="costs",
    question="How many steps?",
    points=tuple(Point(system=System(name=name), x=x) for name, x in COSTS.items()),
    figures=("entity_r1", "entity_likeness"),
    compared=(("one", "many"),),
    recommends=True,
)


def recommended(likeness: dict[str, float], spread: float = 0.02) -> dict[str, object]:
    rng = np.random.default_rng(0)
    scores = []
    for prompt in range(24):
        shared = rng.normal(0.0, 0.2)  # prompts differ by far more than systems
        for name, mean in likeness.items():
            scored = {"entity_r1": float(prompt % 2), "entity_likeness": mean + shared + rng.normal(0.0, spread)}
            scores.append(ScoreRow(system=name, prompt_id=f"p{prompt}", seed=1, sha256="", scores=scored))
    systems = {name: {"all": figures_of([s for s in scores if s.system == name])} for name in likeness}
    return recommend(ROW, scores, systems)


def test_the_cheapest_that_is_as_good_is_recommended() -> None:
    said = recommended({"one": 0.4, "four": 0.598, "other-four": 0.55, "many": 0.6})
    assert said["system"] == "four"
    assert said["behind"] == {"one": ["entity_likeness"], "other-four": ["entity_likeness"]}
    assert said["best"] == {"entity_r1": "one", "entity_likeness": "many"}


def test_what_differs_by_chance_alone_is_not_paid_for() -> None:
    assert recommended({"one": 0.6, "four": 0.6, "many": 0.6}, spread=0.1)["system"] == "one"


def test_of_equal_costs_the_better_one_is_recommended() -> None:
    assert recommended({"four": 0.60, "other-four": 0.61}, spread=0.1)["system"] == "other-four"


def test_where_more_always_helps_the_most_is_recommended() -> None:
    assert recommended({"one": 0.1, "four": 0.2, "other-four": 0.3, "many": 0.4})["system"] == "many"
