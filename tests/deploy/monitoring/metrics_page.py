"""METRICS.md, read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deploy.local.children import ROOT

PAGE = ROOT / "deploy" / "monitoring" / "METRICS.md"


@dataclass(frozen=True)
class Documented:
    """One metric of the page: `processes` are those of its section, none where others export it."""

    name: str
    kind: str
    labels: frozenset[str]
    processes: tuple[str, ...]


def documented() -> list[Documented]:
    """Every metric of the page."""
    found: list[Documented] = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        said = re.search(r"<!-- of: (.+?) -->", section)
        processes = tuple(said[1].split(", ")) if said else ()
        for row in re.findall(r"^\| (`.+)\|$", section, re.MULTILINE):
            names, kind, *rest = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
            labels = re.findall(r"`(\w+)`", rest[0]) if kind in ("counter", "gauge", "histogram") else []
            for name in re.findall(r"`(\w+)`", names):
                found.append(Documented(name, kind, frozenset(labels), processes))
    return found
