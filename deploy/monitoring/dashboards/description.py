"""What a dashboard is here: rows of panels, each with its queries, its unit, and what it means when it moves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WIDTH = 24  # columns of Grafana's grid
STAT_HEIGHT, GRAPH_HEIGHT = 4, 8  # of panels, in rows of that grid


class Unit(StrEnum):
    """Grafana's name of a unit; queries give base units, Grafana scales them."""

    COUNT = "short"
    SECONDS = "s"
    BYTES = "bytes"
    BYTES_PER_SECOND = "binBps"
    RATIO = "percentunit"
    REQUESTS_PER_SECOND = "reqps"
    PER_SECOND = "ops"
    CORES = "none"
    CELSIUS = "celsius"
    WATTS = "watt"
    JOULES = "joule"
    HERTZ = "hertz"
    NUMBER = "none"


class Kind(StrEnum):
    """How a panel draws what its queries give."""

    STAT = "stat"
    LINES = "lines"
    STACKED = "stacked"
    HEAT = "heat"  # one query, of a histogram's buckets by `le`


class Color(StrEnum):
    """Of a value, from a threshold on."""

    GREEN = "green"
    ORANGE = "orange"
    RED = "red"


class Source(StrEnum):
    """Who exports what a panel shows. Only `STACK` runs on one machine without a GPU, a cluster and Qdrant's server."""

    STACK = "the stack"
    DCGM = "dcgm-exporter"
    QDRANT = "Qdrant's server"
    KUBERNETES = "kube-state-metrics and the kubelet"


@dataclass(frozen=True, kw_only=True)
class Query:
    """One query of a panel.

    Attributes:
        expr: PromQL with Grafana's variables.
        legend: of each series, with labels as `{{label}}`.
        after: what has to happen before there is any series; empty: there are some from the start, or from the first call.
    """

    expr: str
    legend: str
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """From this value on the color holds."""

    value: float
    color: Color


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture.

    Attributes:
        title: a few words, one of a kind in its dashboard.
        description: what it shows, and what to think when it moves.
        queries: at least one.
        width: columns of 24.
        steps: colors of the value; green below the first. Without any, none.
        top: the axis goes at least so far.
        logarithmic: the axis is, to base 10.
        may_go_below_zero: else the axis starts at zero.
        alerts: names of the alerts that watch the same figures; each has a runbook.
        at_rest: what a stat shows where nothing was counted.
    """

    title: str
    description: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    source: Source = Source.STACK
    steps: tuple[Step, ...] = ()
    top: float | None = None
    logarithmic: bool = False
    may_go_below_zero: bool = False
    alerts: tuple[str, ...] = ()
    at_rest: str = ""

    @property
    def height(self) -> int:
        """In rows of the grid."""
        return STAT_HEIGHT if self.kind is Kind.STAT else GRAPH_HEIGHT


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels under one heading, from left to right, broken where 24 columns are full."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A choice of label values, all of them at first; `metric` (with a selector, if any) is where they are looked up."""

    name: str
    label: str
    metric: str
    described: str


@dataclass(frozen=True, kw_only=True)
class Board:
    """A dashboard; its file is `name`.json and its uid `reimagen-name`."""

    name: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def uid(self) -> str:
        """Of links to it: it stays what it is."""
        return f"reimagen-{self.name}"

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Of all rows."""
        return tuple(panel for row in self.rows for panel in row.panels)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something lies in the grid."""

    x: int
    y: int
    width: int
    height: int


def places(board: Board) -> list[tuple[Row | Panel, Place]]:
    """Rows' headings and panels in the order of the grid, each with its place."""
    found: list[tuple[Row | Panel, Place]] = []
    y = 0
    for row in board.rows:
        found.append((row, Place(x=0, y=y, width=WIDTH, height=1)))
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, tallest = 0, y + tallest, 0
            found.append((panel, Place(x=x, y=y, width=panel.width, height=panel.height)))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
    return found
