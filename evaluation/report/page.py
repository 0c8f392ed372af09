"""The report as one HTML file that loads nothing: sections of text, plots, tables, contact sheets, and where it all is from."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = "page.html.j2"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Of a table: a value, and its interval."""

    value: str
    range: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG inside the page."""

    png: bytes
    caption: str

    @property
    def uri(self) -> str:
        """As the page's own bytes."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        finding: what was read off it, by people.
        provenance: names and texts: the command, the configuration, the hashes.
    """

    title: str
    text: str = ""
    finding: str = ""
    plots: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    sheets: tuple[Picture, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render(title: str, about: str, sections: Sequence[Section]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(title=title, about=about, sections=list(sections))


def cell(figure: Mapping[str, Any] | None) -> Cell:
    """A figure with its interval, as `figures.json` has it; a dash where there is none."""
    if figure is None:
        return Cell(value="-")
    low, high = figure["low"], figure["high"]
    return Cell(value=f"{figure['estimate']:.3f}", range="" if low is None else f"{low:.3f} to {high:.3f}")


def plain(value: object) -> Cell:
    """Anything, as text."""
    return Cell(value=f"{value:g}" if isinstance(value, float) else str(value))
