"""The sweep as a picture: FID and CMMD against CLIP score, a line a knowledge base and 256 weight."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.files import write_atomic


def write_sweep_plot(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of rows as in `results.json`. Right is nearer to the text, down nearer to the photographs."""
    figures = [name for name in ("fid", "cmmd") if any(row[name] is not None for row in rows)]
    figure = Figure(figsize=(1.0 + 5.0 * len(figures), 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, name in enumerate(figures):
        _draw(figure.add_subplot(1, len(figures), place + 1), name, rows)
    figure.suptitle(f"{title}: guidance sweep, weights of the 64 stage along each line")
    stream = io.BytesIO()
    canvas.print_png(stream)
    write_atomic(path, stream.getvalue())


def _draw(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        lines[row["label"], row["weight_256"]].append(row)
    for (label, weight), line in lines.items():
        x = [row["clip_score"]["estimate"] for row in line]
        y = [row[name] for row in line]
        guided = "unguided" if weight is None else f"w {weight:g}"
        axes.plot(x, y, marker="o", label=f"{label}, 256: {guided}")
        for row, across, up in zip(line, x, y, strict=True):
            axes.annotate(f"{row['weight_64']:g}", (across, up), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("CLIP score (higher is better)")
    axes.set_ylabel(f"{name.upper()} (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
