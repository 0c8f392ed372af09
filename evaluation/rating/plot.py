"""The report as one picture: a row a question, points with their intervals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # Paul Tol's bright scheme
_TITLES = {"photorealism": "looks real", "faithfulness": "is what was asked for"}


def plot_report(report: dict[str, Any]) -> bytes:
    """PNG: of each question the systems in all, by frequency and by category."""
    systems = report["systems"]
    groups = ["all", *_names(systems, "frequency"), *_names(systems, "categories")]
    figure = Figure(figsize=(max(6.0, 1.6 + 0.95 * len(groups)), 6.4), dpi=110, layout="constrained")
    axes: Any = figure.subplots(2, 1, sharex=True)
    for axis, (question, title) in zip(axes, _TITLES.items(), strict=True):
        _question(axis, systems, groups, question)
        axis.set_title(title, loc="left")
    axes[1].set_xticks(
        range(len(groups)), groups, rotation=30 if len(groups) > 5 else 0, ha="right" if len(groups) > 5 else "center"
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _names(systems: dict[str, Any], kind: str) -> list[str]:
    return sorted({name for groups in systems.values() for name in groups[kind]})


def _question(axis: Axes, systems: dict[str, Any], groups: Sequence[str], question: str) -> None:
    width = 0.7 / len(systems)
    for s, (system, figures) in enumerate(systems.items()):
        flat = {"all": figures["all"], **figures["frequency"], **figures["categories"]}
        for g, group in enumerate(groups):
            if group not in flat:
                continue
            found = flat[group][question]
            x, y = g + (s - (len(systems) - 1) / 2) * width, found["estimate"]
            color = COLORS[s % len(COLORS)]
            axis.plot(x, y, "o", color=color, markersize=5, label=_shown(system) if group == "all" else None)
            if found["low"] is not None:
                axis.vlines(x, found["low"], found["high"], color=color, linewidth=2, alpha=0.6)
    for g in range(1, len(groups)):
        axis.axvline(g - 0.5, color="#dddddd", linewidth=0.8)
    axis.set_xlim(-0.5, len(groups) - 0.5)
    axis.set_ylim(-0.04, 1.04)
    axis.set_ylabel("share of prompts")
    axis.grid(axis="y", color="#eeeeee")


def _shown(system: str) -> str:
    """Text alone: matplotlib reads formulas between dollar signs, and hides labels that begin with an underscore."""
    return " " + system.replace("$", r"\$")
