"""Which styles stand in for one another: of entities that are not held out, how often one style's drawing finds another's."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from common.corpus import Pair
from common.scenes import Scene
from evaluation.features import SIDE, entity_features
from evaluation.suite import draw

MIN_STYLES = 4  # an entity that few styles have says little of them
ENTITIES = 600

Likeness = dict[str, dict[str, float]]
"""Of a style, the share of its entities that each other style's drawing finds first among the style's own drawings."""


def measure_likeness(
    pairs: Iterable[Pair], facet: str, entities: int, progress: Callable[[str, int, int], None]
) -> Likeness:
    """R@1 of every value's pictures among every other's, on pairs that are not held out.

    Args:
        pairs: of a corpus; held-out ones are passed over.
        facet: whose values are compared.
        entities: so many are drawn at most, those that an order drawn from a fixed seed gives first.

    Raises:
        ValueError: `entities` is not positive, or no entity has pairs of several values of `facet`.
    """
    if entities < 1:
        raise ValueError(f"--entities: {entities} is not 1 or more")
    drawings: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        if not pair.held_out and facet in pair.facets:
            drawings[pair.entity].setdefault(pair.facets[facet], pair)
    chosen = sorted(entity for entity, by_value in drawings.items() if len(by_value) >= MIN_STYLES)
    if not chosen:
        raise ValueError(f"--facet: no entity has pairs of {MIN_STYLES} values of {facet!r}")
    random.Random("alike").shuffle(chosen)
    features: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for done, entity in enumerate(chosen[:entities], 1):
        for value, pair in drawings[entity].items():
            features[value][entity] = entity_features(draw(pair, Scene(), SIDE))
        progress("drawings", done, min(entities, len(chosen)))
    return {value: _found_by(features, value) for value in sorted(features)}


def _found_by(features: dict[str, dict[str, np.ndarray]], value: str) -> dict[str, float]:
    """Of each other value, the share of shared entities whose picture lies next to this value's of the same entity."""
    own = features[value]
    names, gallery = list(own), np.stack(list(own.values()))
    lengths = np.square(gallery).sum(1)
    shares = {}
    for other in sorted(set(features) - {value}):
        shared = [name for name in names if name in features[other]]
        if shared:
            asked = np.stack([features[other][name] for name in shared])
            nearest = [names[place] for place in np.argmin(lengths - 2.0 * asked @ gallery.T, axis=1)]
            shares[other] = float(np.mean([found == name for found, name in zip(nearest, shared, strict=True)]))
    return shares


def in_order(likeness: Likeness) -> dict[str, tuple[str, ...]]:
    """Of each value, the others from the most alike on: what `Facet.alike` holds."""
    return {
        value: tuple(sorted(shares, key=lambda other: (-shares[other], other))) for value, shares in likeness.items()
    }
