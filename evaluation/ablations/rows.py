"""The ablations: a row each. What is compared, along which axis, and what is read off.

All are of the demonstration suite, 64 px, the same prompts and seeds for every system of a row. Prompts are the first of the
suite by the hash of their ids. `retrieved` is by BM25, two neighbors, without the pair that is asked for: so out of style.
A system of one name is one system in all rows, and is drawn once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evaluation.entitydraw.systems import System

Plot = Literal["bars", "lines", "tradeoff"]
PRIOR = "dog face"  # an entity that training knows in many styles


@dataclass(frozen=True, kw_only=True)
class Point:
    """A system's place in the plot: `x` on the axis, in the series of that name."""

    system: System
    x: float = 0.0
    series: str = ""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One experiment.

    Attributes:
        question: what it asks.
        points: the systems.
        figures: what is plotted, see `evaluation.entitydraw.figures`.
        plot: bars beside one another; lines over the axis; or the first figure against the second.
        axis: what `x` is.
        compared: pairs of systems that are tested, first less second.
        prompts, pictures: how many; 0 prompts: all.
        parts: bars of frequent and of infrequent entities instead of all.
        log_axis: whether the axis doubles.
        recommends: whether the axis is a cost, and the row says what to pay: see `recommendation`.
    """

    name: str
    question: str
    points: tuple[Point, ...]
    figures: tuple[str, ...]
    compared: tuple[tuple[str, str], ...]
    plot: Plot = "bars"
    axis: str = ""
    prompts: int = 40
    pictures: int = 1
    parts: tuple[str, ...] = ()
    log_axis: bool = False
    recommends: bool = False

    @property
    def systems(self) -> tuple[System, ...]:
        return tuple(point.system for point in self.points)


def _system(name: str, **knobs: Any) -> System:
    said: dict[str, Any] = {"name": name, "method": "bm25", **knobs}
    return System(**said)


def _bars(*systems: System) -> tuple[Point, ...]:
    return tuple(Point(system=system, x=float(i)) for i, system in enumerate(systems))


def _against(first: str, systems: Sequence[System]) -> tuple[tuple[str, str], ...]:
    return tuple((first, system.name) for system in systems if system.name != first)


RETRIEVED = _system("retrieved")
NONE = _system("none", neighbors="none", method="")
GIVEN = _system("given", neighbors="given", method="")
STRATEGY_STEPS = (16, 32, 64, 128, 256)
STRATEGIES = ("interleaved", "weighted", "joint")
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLERS = ("ddim", "dpmpp_2m", "ddpm")
SAMPLER_STEPS = (4, 8, 12, 16, 32)

NEIGHBORS = Ablation(
    name="neighbors",
    question="Do neighbors make entities that the weights have never seen faithful?",
    points=_bars(NONE, RETRIEVED),
    figures=("entity_r1", "entity_r5", "style", "text", "near_copy"),
    compared=(("retrieved", "none"),),
    prompts=96,
)
FREQUENCY = Ablation(
    name="frequency",
    question="Is the gain larger for infrequent entities?",
    points=_bars(NONE, RETRIEVED),
    figures=("entity_r1", "entity_r5"),
    compared=(("retrieved", "none"),),
    prompts=96,
    parts=("frequent", "infrequent"),
)
GUIDANCE = Ablation(
    name="guidance",
    question="Does interleaved guidance overtake weighted guidance as steps grow (figure 13)?",
    points=tuple(
        Point(
            system=_system(f"{strategy}-{steps}", guidance_strategy=strategy, steps=steps),
            x=float(steps),
            series=strategy,
        )
        for strategy in STRATEGIES
        for steps in STRATEGY_STEPS
    ),
    figures=("entity_r1", "entity_likeness"),
    compared=tuple((f"interleaved-{n}", f"weighted-{n}") for n in STRATEGY_STEPS)
    + tuple((f"interleaved-{n}", f"joint-{n}") for n in STRATEGY_STEPS),
    plot="lines",
    axis="steps",
    prompts=8,
    log_axis=True,
)
ETA = Ablation(
    name="eta",
    question="What does eta trade: text alignment against entity faithfulness?",
    points=tuple(
        Point(
            system=_system(f"{strategy}-eta-{round(100 * eta)}", guidance_strategy=strategy, eta=eta),
            x=eta,
            series=strategy,
        )
        for strategy, etas in (("weighted", ETAS), ("interleaved", ETAS[1:-1]))  # at 0 and at 1 the two are one
        for eta in etas
    ),
    figures=("text", "entity_r1"),
    compared=(
        ("weighted-eta-0", "weighted-eta-100"),
        ("weighted-eta-0", "weighted-eta-50"),
        ("weighted-eta-50", "interleaved-eta-50"),
    ),
    plot="tradeoff",
    axis="eta",
    prompts=32,
)
K = Ablation(
    name="k",
    question="How many neighbors?",
    points=(
        Point(system=NONE, x=0.0),
        Point(system=_system("k-1", k=1), x=1.0),
        Point(system=RETRIEVED, x=2.0),
        Point(system=_system("k-4", k=4), x=4.0),
    ),
    figures=("entity_r1", "entity_r5", "text"),
    compared=(("k-1", "none"), ("retrieved", "k-1"), ("k-4", "retrieved")),
    plot="lines",
    axis="K",
    prompts=96,
)
METHOD = Ablation(
    name="method",
    question="BM25, CLIP, both fused, or references that are given?",
    points=_bars(RETRIEVED, *(_system(method, method=method) for method in ("clip", "hybrid")), GIVEN),
    figures=("neighbors_right", "entity_r1", "entity_r5", "text"),
    compared=(("retrieved", "clip"), ("hybrid", "retrieved"), ("hybrid", "clip"), ("retrieved", "given")),
)
KNOWLEDGE_BASE = Ablation(
    name="knowledge-base",
    question="Does the knowledge base need the style that is asked for, and does it need the entity?",
    points=_bars(
        _system("in-style", excluded="nothing"),
        RETRIEVED,
        _system("without-entity", excluded="entity"),
    ),
    figures=("neighbors_right", "entity_r1", "style", "text", "near_copy"),
    compared=(("in-style", "retrieved"), ("retrieved", "without-entity")),
)
SAMPLER = Ablation(
    name="sampler",
    question="Which sampler, and how many steps?",
    points=tuple(
        Point(
            system=_system(f"{sampler.replace('_', '-')}-{steps}", sampler=sampler, steps=steps),
            x=float(steps),
            series=sampler,
        )
        for sampler in SAMPLERS
        for steps in SAMPLER_STEPS
    ),
    figures=("entity_r1", "entity_likeness"),
    compared=tuple(("ddim-12", name) for name in ("ddim-4", "ddim-8", "ddim-32", "dpmpp-2m-12", "ddpm-12")),
    plot="lines",
    axis="steps",
    prompts=32,
    log_axis=True,
    recommends=True,
)
STRONG_PRIOR = Ablation(
    name="strong-prior",
    question=f"A strong prior in the prompt: it says '{PRIOR}', which training knows, before the entity.",
    points=_bars(
        RETRIEVED,
        _system("prior-retrieved", prompt=f"{PRIOR} {{name}}{{rest}}"),
        GIVEN,
        replace(GIVEN, name="prior-given", prompt=f"{PRIOR} {{name}}{{rest}}"),
    ),
    figures=("neighbors_right", "entity_r1", "text"),
    compared=(("retrieved", "prior-retrieved"), ("given", "prior-given")),
    prompts=32,
)
WRONG_NEIGHBOR = Ablation(
    name="wrong-neighbor",
    question="A wrong neighbor: references of another entity of the category.",
    points=_bars(GIVEN, _system("wrong", neighbors="wrong", method=""), NONE),
    figures=("entity_r1", "other_r1", "text"),
    compared=(("given", "wrong"), ("wrong", "none")),
    prompts=32,
)
TWO_ENTITIES = Ablation(
    name="two-entities",
    question="Two entities in one prompt, a reference of each.",
    points=_bars(GIVEN, _system("two", neighbors="mixed", method="", prompt="{name} and {other}{rest}")),
    figures=("entity_r1", "other_r1", "entity_r5", "text"),
    compared=(("given", "two"),),
    prompts=32,
)
ABLATIONS: tuple[Ablation, ...] = (
    NEIGHBORS,
    FREQUENCY,
    K,
    METHOD,
    KNOWLEDGE_BASE,
    ETA,
    SAMPLER,
    GUIDANCE,
    STRONG_PRIOR,
    WRONG_NEIGHBOR,
    TWO_ENTITIES,
)


def ablation(name: str) -> Ablation:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    for row in ABLATIONS:
        if row.name == name:
            return row
    raise ValueError(f"ablation: {name!r} is none of {', '.join(row.name for row in ABLATIONS)}")
