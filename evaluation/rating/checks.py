"""Attention checks: items whose right answer is known, among the others and of the same looks.

=========  ==============================================================  ==================
kind       what is shown                                                   what must be said
=========  ==============================================================  ==================
`real`     a real picture of the entity                                    photorealism 1
`wrong`    a real picture of another entity, of another category           faithfulness 0
           if there is one
`broken`   a real picture of the entity, its tiles in disorder             photorealism 0
=========  ==============================================================  ==================

Whoever always says yes fails two of three, whoever always says no one of three, and whoever does not look half of them.
What is not certain is not asked: a real picture need not show what else the prompt says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from evaluation.rating.items import Change, CheckKind, Item, Shown

KINDS: tuple[CheckKind, ...] = get_args(CheckKind)
MUST_SAY: dict[CheckKind, tuple[str, int]] = {
    "real": ("photorealism", 1),
    "wrong": ("faithfulness", 0),
    "broken": ("photorealism", 0),
}
_REAL_CHANGES: tuple[Change, ...] = ("none", "mirrored", "closer", "closer-mirrored")


def make_check(items: Sequence[Item], name: str, kind: CheckKind) -> Item:
    """The check that `name` stands for, of one of `possible_kinds`; the same arguments give the same one.

    Args:
        items: what is rated; the check takes prompt and references from one of them, and has as many pictures as the most.
        name: any text, no two checks of a rater having the same.
    """
    draw = random.Random(f"{name}/{kind}")
    subject = draw.choice(items)
    count = max(len(item.pictures) for item in items)
    source, shown = subject.references[-1], subject.references
    if kind == "real" and len(shown) > 1:
        shown = shown[:-1]  # what is judged is not what it is compared with
    if kind == "wrong":
        source = _another(items, subject, draw)
    return replace(
        subject,
        item_id=f"check-{kind}-{name}",
        system="",
        pictures=_variants(source, kind, count, draw),
        references=shown,
        check=kind,
    )


def possible_kinds(items: Sequence[Item]) -> tuple[CheckKind, ...]:
    """The kinds that these items allow: where all are of one entity, none is another's."""
    several = len({item.entity for item in items}) > 1
    return KINDS if several else tuple(kind for kind in KINDS if kind != "wrong")


def passes(kind: CheckKind, photorealism: int, faithfulness: int) -> bool:
    """Whether a check was answered as it must be."""
    question, answer = MUST_SAY[kind]
    return {"photorealism": photorealism, "faithfulness": faithfulness}[question] == answer


def _another(items: Sequence[Item], subject: Item, draw: random.Random) -> Path:
    others = [item for item in items if item.category != subject.category]
    others = others or [item for item in items if item.entity != subject.entity]
    return draw.choice(others).references[0]


def _variants(source: Path, kind: CheckKind, count: int, draw: random.Random) -> tuple[Shown, ...]:
    if kind == "broken":
        return tuple(Shown(path=source, change="scrambled", seed=draw.randrange(1 << 30)) for _ in range(count))
    changes: list[Change] = [_REAL_CHANGES[i % len(_REAL_CHANGES)] for i in range(count)]
    return tuple(Shown(path=source, change=change, seed=i) for i, change in enumerate(changes))
