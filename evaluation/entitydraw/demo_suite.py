"""The suite of the demonstration corpus: its held-out entities in natural categories, asked for in a style and a scene.

Each entity is asked for in up to PROMPTS styles, drawn by hashing; the pair of that style is the target, those of the other
styles are its references. Frequency is how many styles draw the entity, and how many captions of other entities hold all
its words: what the corpus has of it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.corpus import Pair, iter_pairs, read_manifest
from common.files import write_atomic
from common.scenes import caption, sample_scene
from evaluation.clip_recall import told_words
from evaluation.entitydraw.suite_file import FORMAT, SLOT, SuiteError
from evaluation.suite import MIN_GALLERY

PROMPTS = 3
MIN_STYLES = 2  # one that is asked for, another one to be found


def make_demo_suite(corpus: Path, categories: Path, *, min_gallery: int = MIN_GALLERY) -> dict[str, Any]:
    """The suite as its file has it.

    Args:
        corpus: the demonstration corpus.
        categories: YAML, a list of entities by category.
        min_gallery: styles with fewer held-out pairs are not asked for: among few, any picture is found.

    Raises:
        SuiteError: an entity is not held out, or too few styles draw it.
    """
    named: dict[str, list[str]] = yaml.safe_load(categories.read_text(encoding="utf-8"))
    pairs = list(iter_pairs(corpus))
    held_out: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.held_out:
            held_out[pair.entity].append(pair)
    galleries = Counter(pair.facets["style"] for found in held_out.values() for pair in found)
    styles = {style for style, count in galleries.items() if count >= min_gallery}
    words = [told_words(entity) for entity in (pair.entity for pair in pairs)]
    entities = []
    for category, names in sorted(named.items()):
        for name in sorted(names):
            drawn = sorted(held_out.get(name, ()), key=_order)
            if len(drawn) < MIN_STYLES:
                raise SuiteError(
                    f"suite: {categories}: {category}: {name!r} is held out in {len(drawn)} styles, not two"
                )
            entities.append(_entity(name, category, drawn, _frequency(name, drawn, words), styles))
    manifest = read_manifest(corpus)
    return {
        "format": FORMAT,
        "name": "demo",
        "about": f"Held-out entities of the corpus {manifest.name} {manifest.version}, fingerprint {manifest.fingerprint};"
        " made by `python -m evaluation demo-suite`.",
        "categories": {category: [f"{SLOT}, on a white background"] for category in sorted(named)},
        "entities": entities,
    }


def write_demo_suite(path: Path, document: dict[str, Any]) -> None:
    """Write it as JSON, a line an entity: a change shows as a line."""
    lines = ",\n".join("    " + json.dumps(entity, ensure_ascii=False) for entity in document["entities"])
    rest = {name: value for name, value in document.items() if name != "entities"}
    head = json.dumps(rest, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_atomic(path, f'{head},\n  "entities": [\n{lines}\n  ]\n}}\n')


def _entity(name: str, category: str, drawn: Sequence[Pair], frequency: int, styles: set[str]) -> dict[str, Any]:
    asked = [pair for pair in drawn if pair.facets["style"] in styles][: min(PROMPTS, len(drawn))]
    if not asked:
        raise SuiteError(f"suite: {category}: {name!r} is drawn in no style of enough held-out pairs")
    return {
        "name": name,
        "category": category,
        "frequency": frequency,
        "references": [{"pair": pair.key} for pair in drawn],
        "prompts": [{"template": _template(pair), "target": pair.key} for pair in asked],
    }


def _template(pair: Pair) -> str:
    scene = sample_scene(random.Random(f"entitydraw/{pair.key}"))
    return caption(SLOT, pair.facets["style"], scene)


def _frequency(name: str, drawn: Sequence[Pair], words: Sequence[frozenset[str]]) -> int:
    own = told_words(name)
    return max(len(drawn), sum(own <= each for each in words))


def _order(pair: Pair) -> str:
    return hashlib.sha256(f"entitydraw/{pair.key}".encode()).hexdigest()
