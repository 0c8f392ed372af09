"""Which styles stand in for which, where it is known: one style is another's drawings, a little moved; one is noise."""

from __future__ import annotations

import numpy as np
import pytest

from common.corpus import Pair
from evaluation.alike import in_order, measure_likeness
from retrieval_svc.iconify import ALIKE, SETS


def drawing(rng: np.random.Generator, shift: int = 0, held_out: bool = False, *, entity: str, style: str) -> Pair:
    """Four colored bars, whose places and colors the generator draws."""
    bars = "".join(
        f'<rect x="{rng.integers(0, 40) + shift}" y="{rng.integers(0, 40)}" width="12" height="20" '
        f'fill="rgb({",".join(str(value) for value in rng.integers(0, 200, 3))})"/>'
        for _ in range(4)
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{bars}</svg>'.encode()
    return Pair(
        key=f"{style}-{entity}",
        caption=entity,
        image=svg,
        image_format="svg",
        entity=entity,
        facets={"style": style},
        held_out=held_out,
    )


def test_a_style_that_draws_the_same_is_the_most_alike() -> None:
    pairs, done = [], []
    for number in range(12):
        entity = f"thing {number}"
        for style, seed, shift in (("plain", 0, 0), ("moved", 0, 1), ("other", 1, 0), ("another", 2, 0)):
            rng = np.random.default_rng((seed, number))
            pairs.append(drawing(rng, shift, entity=entity, style=style))
    pairs += [drawing(np.random.default_rng(9), held_out=True, entity="thing 0", style="held out")]
    likeness = measure_likeness(pairs, "style", 10, lambda task, n, total: done.append((task, n, total)))
    assert done[-1] == ("drawings", 10, 10)
    assert set(likeness) == {"plain", "moved", "other", "another"}, "what is held out is not looked at"
    assert likeness["plain"]["moved"] == likeness["moved"]["plain"] == 1.0
    assert likeness["plain"]["other"] < 0.5 and likeness["other"]["another"] < 0.5
    ordered = in_order(likeness)
    assert ordered["plain"][0] == "moved" and set(ordered["plain"]) == {"moved", "other", "another"}


def test_what_cannot_be_compared_is_said() -> None:
    pairs = [drawing(np.random.default_rng(0), entity="thing", style="plain")]
    with pytest.raises(ValueError, match="--entities: 0 is not 1 or more"):
        measure_likeness(pairs, "style", 0, lambda task, done, total: None)
    with pytest.raises(ValueError, match="--facet: no entity has pairs of 4 values of 'color'"):
        measure_likeness(pairs, "color", 10, lambda task, done, total: None)


def test_the_demonstration_says_it_of_every_style() -> None:
    assert {style: set(others) for style, others in ALIKE.items()} == {s: set(SETS) - {s} for s in SETS}
