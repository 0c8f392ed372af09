"""One plot of an ablation's figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.ablations.rows import Ablation, Point

INCHES = (7.2, 4.2)
DPI = 110
COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#4a5568")

Systems = Mapping[str, Mapping[str, Any]]
"""Of a run's figures: what each system reached."""


def draw_plot(row: Ablation, systems: Systems, advice: Mapping[str, Any] | None = None) -> bytes:
    """A PNG; the same figures give the same bytes. `advice` may name a `recommended` system, which is marked."""
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    {"bars": _bars, "lines": _lines, "tradeoff": _tradeoff}[row.plot](axes, row, systems)
    recommended = (advice or {}).get("recommended", {}).get("system", "")
    for point in row.points if recommended else ():
        if point.system.name == recommended:
            axes.axvline(point.x, color="#718096", linewidth=6, alpha=0.2, zorder=0)
    axes.set_title(row.question + (f"   recommended: {recommended}" if recommended else ""), fontsize=10)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _bars(axes: Axes, row: Ablation, systems: Systems) -> None:
    groups = [(figure, part) for figure in row.figures for part in (row.parts or ("",))]
    width = 0.8 / len(row.points)
    for i, point in enumerate(row.points):
        found = [_figure(systems, point, figure, part) for figure, part in groups]
        places = [g + width * (i - (len(row.points) - 1) / 2) for g, f in enumerate(found) if f]
        known = [f for f in found if f]
        axes.bar(
            places,
            [f["estimate"] for f in known],
            width * 0.92,
            yerr=_errors(known),
            color=COLORS[i % len(COLORS)],
            label=point.system.name,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333"},
        )
    shown = [(f if len(row.figures) > 1 else "", part.removeprefix("category/")) for f, part in groups]
    axes.set_xticks(range(len(groups)), [f"{f}\n{part}".strip() for f, part in shown], fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _lines(axes: Axes, row: Ablation, systems: Systems) -> None:
    for i, (series, points) in enumerate(_series(row).items()):
        for figure, style in zip(row.figures, ("-", "--", ":", "-."), strict=False):
            found = [(p.x, _figure(systems, p, figure, "")) for p in points]
            known = [(x, f) for x, f in found if f]
            if not known:
                continue
            axes.errorbar(
                [x for x, _ in known],
                [f["estimate"] for _, f in known],
                yerr=_errors([f for _, f in known]),
                marker="o",
                markersize=3.5,
                linestyle=style,
                linewidth=1.4,
                capsize=2,
                elinewidth=0.7,
                color=COLORS[i if series or len(_series(row)) > 1 else row.figures.index(figure)],
                label=f"{series} {figure}".strip(),
            )
    if row.log_axis:
        axes.set_xscale("log", base=2)
        ticks = sorted({point.x for point in row.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(row.axis)
    axes.legend(fontsize=7, frameon=False, ncols=2)


def _tradeoff(axes: Axes, row: Ablation, systems: Systems) -> None:
    across, up = row.figures[:2]
    for i, (series, points) in enumerate(_series(row).items()):
        found = [(p, _figure(systems, p, across, ""), _figure(systems, p, up, "")) for p in points]
        known = [(p, a, u) for p, a, u in found if a and u]
        if not known:
            continue
        axes.errorbar(
            [a["estimate"] for _, a, _ in known],
            [u["estimate"] for _, _, u in known],
            xerr=_errors([a for _, a, _ in known]),
            yerr=_errors([u for _, _, u in known]),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.5,
            color=COLORS[i],
            label=series,
        )
        for p, a, u in known:
            place = (a["estimate"], u["estimate"])
            axes.annotate(f"{p.x:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=COLORS[i])
    axes.set_xlabel(f"{across} (points: {row.axis})")
    axes.set_ylabel(up)
    axes.legend(fontsize=8, frameon=False)


def _series(row: Ablation) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in row.points:
        found.setdefault(point.series, []).append(point)
    return found


def _figure(systems: Systems, point: Point, figure: str, part: str) -> Mapping[str, Any] | None:
    said = systems.get(point.system.name, {})
    return (said.get("parts", {}).get(part, {}) if part else said.get("all", {})).get(figure)


def _errors(found: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Lengths below and above the estimates."""
    below = [max(0.0, f["estimate"] - (f["estimate"] if f["low"] is None else f["low"])) for f in found]
    above = [max(0.0, (f["estimate"] if f["high"] is None else f["high"]) - f["estimate"]) for f in found]
    return [below, above]
