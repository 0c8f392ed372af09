"""A dashboard's queries drawn in its own grid: what they said of a time, with units and legends. No screenshot of Grafana."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from deploy.monitoring.dashboards.description import WIDTH, Board, Color, Kind, Panel, Place, Query, Row, places
from deploy.monitoring.dashboards.live.prometheus import Series
from deploy.monitoring.dashboards.units import spoken

COLUMN_IN, ROW_IN, HEAD_IN, DPI = 0.72, 0.36, 0.55, 100
INK, FAINT, PAPER, PLATE = "#24292e", "#6a737d", "#f4f5f5", "#ffffff"
LINES = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#12939a", "#b5870b", "#8a6d9b", "#5f6b7a", "#c15c7a")
THRESHOLDS = {Color.GREEN: "#56a64b", Color.ORANGE: "#ff9830", Color.RED: "#e02f44"}
MOST_LEGENDS = 8
_LABEL = re.compile(r"{{(\w+)}}")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a query gave over the time that is drawn."""

    query: Query
    series: Sequence[Series]


def picture(board: Board, answers: dict[str, Sequence[Answered]], start: float, end: float, caption: str) -> bytes:
    """A PNG.

    Args:
        answers: of each panel, by `key`.
        start, end: seconds since 1970.
        caption: beneath the title: what this is.
    """
    placed = places(board)
    height = max(place.y + place.height for _, place in placed)
    width_in, height_in = WIDTH * COLUMN_IN, height * ROW_IN + HEAD_IN
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor=PAPER)
    figure.text(
        0.008, 1 - 0.2 / height_in, f"Re-Imagen / {board.title}", size=13, weight="bold", color=INK, va="center"
    )
    figure.text(0.008, 1 - 0.42 / height_in, caption, size=8, color=FAINT, va="center")
    for item, place in placed:
        box = _box(place, width_in, height_in)
        if isinstance(item, Row):
            figure.text(box[0] + 0.004, box[1] + box[3] / 2, item.title, size=10, weight="bold", color=INK, va="center")
        else:
            _panel(figure, item, answers[key(board, place)], box, (start, end))
    return _png(figure)


def key(board: Board, place: Place) -> str:
    """Names a panel by where it is."""
    return f"{board.name} {place.x} {place.y}"


def _box(place: Place, width_in: float, height_in: float) -> tuple[float, float, float, float]:
    """Left, bottom, width and height as shares of the figure."""
    top_in = HEAD_IN + place.y * ROW_IN
    return (
        place.x * COLUMN_IN / width_in,
        1 - (top_in + place.height * ROW_IN) / height_in,
        place.width * COLUMN_IN / width_in,
        place.height * ROW_IN / height_in,
    )


def _panel(
    figure: Figure,
    panel: Panel,
    answers: Sequence[Answered],
    box: tuple[float, float, float, float],
    span: tuple[float, float],
) -> None:
    left, bottom, width, height = box
    size = figure.get_size_inches()
    pad_x, pad_y = 0.05 / size[0], 0.05 / size[1]
    plate = figure.add_axes((left + pad_x, bottom + pad_y, width - 2 * pad_x, height - 2 * pad_y))
    plate.set(xticks=[], yticks=[], facecolor=PLATE)
    plate.spines[:].set_color("#d8dadf")
    figure.text(
        left + 3 * pad_x, bottom + height - 0.19 / size[1], panel.title, size=8.5, weight="bold", color=INK, va="center"
    )
    if panel.kind is Kind.STAT:
        _stat(plate, panel, answers)
        return
    inner_left, inner_right = 0.62 / size[0], 0.14 / size[0]
    legend_in = 0.0 if panel.kind is Kind.HEAT else 0.16 * math.ceil(min(MOST_LEGENDS, _num_series(answers)) / 2) + 0.04
    floor, head = (0.3 + legend_in) / size[1], 0.36 / size[1]
    axes = figure.add_axes((left + inner_left, bottom + floor, width - inner_left - inner_right, height - floor - head))
    axes.tick_params(labelsize=7, colors=FAINT, length=2)
    axes.spines[:].set_color("#d8dadf")
    axes.set_xlim(_moment(span[0]), _moment(span[1]))  # type: ignore[arg-type]
    locator = AutoDateLocator(minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    _heat(axes, panel, answers) if panel.kind is Kind.HEAT else _lines(axes, panel, answers, legend_in)


def _stat(plate: Axes, panel: Panel, answers: Sequence[Answered]) -> None:
    """The last value on the color of its threshold, with its course behind it."""
    series = next((each for answer in answers for each in answer.series if each.has_values), None)
    if series is None:
        plate.text(0.5, 0.42, "no data", ha="center", va="center", size=14, color=FAINT, transform=plate.transAxes)
        return
    values = [value for value in series.values if math.isfinite(value)]
    color = INK
    if panel.steps:
        color = "white"
        plate.set_facecolor(THRESHOLDS[reached(panel, values[-1])])
        for text in plate.figure.texts[-1:]:
            text.set_color("white")
    line = plate.figure.add_axes(_lower_part(plate))
    line.set_axis_off()
    line.fill_between(range(len(values)), values, alpha=0.25, color="white" if panel.steps else LINES[0], linewidth=0)
    line.set_ylim(min(0.0, *values), max(1e-9, *values) * 1.6)
    plate.text(
        0.5,
        0.44,
        spoken(values[-1], panel.unit),
        ha="center",
        va="center",
        size=19,
        weight="bold",
        color=color,
        transform=plate.transAxes,
    )


def _lower_part(plate: Axes) -> tuple[float, float, float, float]:
    box = plate.get_position()
    return (box.x0, box.y0, box.width, box.height * 0.55)


def reached(panel: Panel, value: float) -> Color:
    """The color of the step that a value has reached."""
    first = Color.RED if panel.steps[-1].color is Color.GREEN else Color.GREEN
    return next((step.color for step in reversed(panel.steps) if value >= step.value), first)


def _lines(axes: Axes, panel: Panel, answers: Sequence[Answered], legend_in: float) -> None:
    drawn = list(_named(answers))
    moments = [_moment(time) for time in _grid(drawn)]
    table = np.array([_on_grid(series, _grid(drawn)) for _, series in drawn])
    colors = [LINES[number % len(LINES)] for number in range(len(drawn))]
    if not drawn:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color=FAINT, transform=axes.transAxes)
    elif panel.kind is Kind.STACKED:
        axes.stackplot(moments, np.nan_to_num(table), colors=colors, alpha=0.75, linewidth=0.4)  # type: ignore[arg-type]
    else:
        for row, color in zip(table, colors, strict=True):
            axes.plot(moments, row, color=color, linewidth=1.2, alpha=0.9)  # type: ignore[arg-type]
    _scale(axes, panel, table)
    for step in panel.steps:
        low, high = axes.get_ylim()
        if low <= step.value <= high:
            axes.axhline(step.value, color=THRESHOLDS[step.color], linewidth=0.9, linestyle="--")
    axes.yaxis.set_major_formatter(lambda value, _: spoken(value, panel.unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#eceef0", linewidth=0.6)
    _legend(axes, panel, drawn, colors, legend_in)


def _scale(axes: Axes, panel: Panel, table: Any) -> None:
    known = table[np.isfinite(table)] if table.size else np.array([0.0])
    if panel.logarithmic and known.size and known.max() > 0:
        axes.set_yscale("log")
        return
    top = np.nan_to_num(table).sum(axis=0).max() if panel.kind is Kind.STACKED and table.size else known.max(initial=0)
    if not panel.may_go_below_zero:
        axes.set_ylim(min(0.0, known.min(initial=0)), max(float(top) * 1.1, panel.top or 0.0, 1e-9 if top else 1.0))


def _legend(axes: Axes, panel: Panel, drawn: list[tuple[str, Series]], colors: list[str], legend_in: float) -> None:
    """Names under the axes in two columns, with the last value of each."""
    extent = axes.get_window_extent()
    width_in, height_in = extent.width / DPI, extent.height / DPI
    for number, ((name, series), color) in enumerate(zip(drawn, colors, strict=True)):
        if number == MOST_LEGENDS - 1 and len(drawn) > MOST_LEGENDS:
            name, last, color = f"and {len(drawn) - number} more", "", FAINT
        else:
            last = spoken(next((v for v in reversed(series.values) if math.isfinite(v)), math.nan), panel.unit)
        column, row = number % 2, number // 2
        wide = panel.width >= 12
        room = (44 if wide else 27) if panel.width > 6 else 20
        shown = name if len(name) <= room else f"{name[: room - 9]}…{name[-8:]}"
        axes.text(
            (-0.3 + panel.width * COLUMN_IN / 2 * column) / width_in,
            -(0.3 + 0.16 * row) / height_in,
            f"■ {shown}  {last}",
            size=6.3,
            color=color,
            va="center",
            transform=axes.transAxes,
        )
        if number == MOST_LEGENDS - 1:
            break


def _heat(axes: Axes, panel: Panel, answers: Sequence[Answered]) -> None:
    """Counts by time and bucket: differences of the buckets' cumulative counts."""
    buckets = sorted(
        ((float(series.labels["le"]), series) for answer in answers for series in answer.series),
        key=lambda pair: pair[0],
    )
    times = _grid([("", series) for _, series in buckets])
    if not times:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color=FAINT, transform=axes.transAxes)
        return
    table = np.array([np.nan_to_num(_on_grid(series, times)) for _, series in buckets])
    counts = np.maximum(np.diff(table, axis=0, prepend=0), 0)
    used = np.flatnonzero(counts.sum(axis=1))
    low, high = (max(0, used[0] - 1), min(len(buckets), used[-1] + 2)) if used.size else (0, len(buckets))
    moments = [_moment(time) for time in times]
    shown = np.where(counts[low:high] > 0, counts[low:high], np.nan)
    axes.pcolormesh(moments, np.arange(high - low), shown, cmap="Oranges", shading="nearest", vmin=0)  # type: ignore[arg-type]
    bounds = [bound for bound, _ in buckets[low:high]]
    axes.set_yticks(range(len(bounds)), [f"≤ {spoken(b, panel.unit)}" if math.isfinite(b) else "more" for b in bounds])


def _named(answers: Sequence[Answered]) -> Iterator[tuple[str, Series]]:
    for answer in answers:
        for series in answer.series:
            if series.has_values:
                yield _legend_of(answer.query, series), series


def _legend_of(query: Query, series: Series) -> str:
    return _LABEL.sub(lambda match: series.labels.get(match[1], ""), query.legend).strip()


def _num_series(answers: Sequence[Answered]) -> int:
    return max(1, len(list(_named(answers))))


def _grid(drawn: Sequence[tuple[str, Series]]) -> list[float]:
    """The times of all series, and those between at which none has a value, so that nothing is drawn across."""
    known = sorted({time for _, series in drawn for time in series.times})
    if len(known) < 2:
        return known
    step = min(after - before for before, after in pairwise(known))
    return [known[0] + number * step for number in range(round((known[-1] - known[0]) / step) + 1)]


def _on_grid(series: Series, times: Sequence[float]) -> list[float]:
    known = {round(time, 3): value for time, value in zip(series.times, series.values, strict=True)}
    found = [known.get(round(time, 3), math.nan) for time in times]
    return [value if math.isfinite(value) else math.nan for value in found]


def _moment(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)


def _png(figure: Figure) -> bytes:
    """With as many colors as such a picture has: a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    stored = io.BytesIO()
    shown = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    shown.quantize(128, dither=Image.Dither.NONE).save(stored, "PNG", optimize=True)
    return stored.getvalue()
