"""The statistics of KNN-ImageText as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.knn_statistics import Statistics

_STYLE = "body{font:15px sans-serif;margin:2em auto;max-width:60em}td,th{padding:.2em .8em;text-align:left}"


def html_report(figures: dict[str, Any], statistics: Statistics) -> str:
    """The page: plots, the figures, and the hubs by name."""
    picture = base64.b64encode(plots(statistics)).decode()
    flat = [(name, value) for name, value in _flattened("", figures) if not name.startswith("hubness.top")]
    hubs = [(hub["pair_id"], hub["caption"], hub["k_occurrence"]) for hub in figures["hubness"]["top"]]
    title = f"KNN-ImageText: {figures['pairs']:,} pairs, {figures['method']}, k = {figures['k']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><img alt="plots" width="100%" src="data:image/png;base64,{picture}">'
        f"<h2>Figures</h2>{_table(('figure', 'value'), flat)}"
        f"<h2>Pairs that are neighbors most often</h2>{_table(('pair', 'caption', 'times a neighbor'), hubs)}</html>\n"
    )


def plots(statistics: Statistics) -> bytes:
    """PNG of four plots: scores, how often a pair is a neighbor, neighbors of a pair, same entity by rank."""
    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
    axes: Any = figure.subplots(2, 2)
    _scores(axes[0, 0], statistics)
    _occurrences(axes[0, 1], statistics)
    k = statistics.asked.k
    axes[1, 0].bar(range(k + 1), statistics.having, color="#4477aa")
    axes[1, 0].set(title="pairs by number of neighbors", xlabel="neighbors", ylabel="pairs", xticks=range(k + 1))
    shares = statistics.same_by_rank / np.maximum(statistics.known_by_rank, 1)
    axes[1, 1].bar(range(1, k + 1), shares, color="#228833")
    axes[1, 1].set(title="neighbors of the pair's own entity", xlabel="rank", ylabel="share", ylim=(0, 1))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _scores(axes: Axes, statistics: Statistics) -> None:
    for parts, name in ((statistics.best, "first neighbor"), (statistics.worst, "last neighbor")):
        scores = np.concatenate(parts) if parts else np.empty(0)
        if len(scores):
            axes.hist(scores, bins=80, histtype="step", label=name)
    axes.set(title=f"scores ({statistics.asked.method})", xlabel="score", ylabel="pairs")
    if axes.patches:
        axes.legend()


def _occurrences(axes: Axes, statistics: Statistics) -> None:
    values, counts = np.unique(statistics.occurrences, return_counts=True)
    at_least = counts[::-1].cumsum()[::-1] / max(len(statistics.occurrences), 1)
    axes.loglog(np.maximum(values, 0.5), at_least, drawstyle="steps-post", color="#aa3377")
    axes.set(title="hubness: pairs that are a neighbor n times or more", xlabel="n (0 at 0.5)", ylabel="share of pairs")


def _flattened(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in _flattened(f"{name}.{key}" if name else key, inner)]
    return [(name, value)]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def row(cells: tuple[Any, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
