"""A whole run: reference, sweep, scores, plot. Layout of its folder:

run.json                           protocol, local copy, sampling, weights, encoders: another run is refused here
reference/features-*.safetensors   of the reference pictures
points/POINT/pictures/000000.png   as the service gave them, their records inside
points/POINT/features-*.safetensors
results.json, sweep.png            scores of every point; FID and CMMD against CLIP score
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import write_json
from evaluation.photographs.drawing import Drawing, draw_point
from evaluation.photographs.local_copy import LocalCopy, reference_pictures
from evaluation.photographs.measuring import Encoders, FeatureShards, Scores, measure_reference, scores_of
from evaluation.photographs.plot import write_sweep_plot
from evaluation.photographs.protocol import Protocol, SweepPoint

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A point and its scores."""

    point: SweepPoint
    scores: Scores

    def row(self) -> dict[str, Any]:
        """For `results.json`."""
        named = {"point": self.point.name, **asdict(self.point)}
        return named | asdict(self.scores)


def run_sweep(
    folder: Path,
    protocol: Protocol,
    copy: LocalCopy,
    points: Sequence[SweepPoint],
    encoders: Encoders,
    drawing: Drawing,
    described: dict[str, Any],
    progress: Progress,
) -> list[Measured]:
    """Do what is not done yet; results are written after every point.

    Args:
        described: what decides the figures, for `run.json`; JSON.

    Raises:
        ValueError: the folder holds another run; the message names what differs.
    """
    _begin(folder, described)
    total = len(copy.references)
    reference = measure_reference(
        FeatureShards(folder / "reference", total),
        lambda rows: reference_pictures(copy.references[rows.start : rows.stop]),
        encoders,
        lambda done: progress("reference pictures", done, total),
    )
    measured: list[Measured] = []
    for i, point in enumerate(points):
        task, count = f"{point.name} ({i + 1} of {len(points)})", len(copy.prompts)
        shards = draw_point(
            folder / "points" / point.name,
            point,
            copy.prompts,
            encoders,
            drawing,
            lambda done, task=task, count=count: progress(task, done, count),
        )
        measured.append(Measured(point=point, scores=scores_of(shards, reference)))
        write_json(
            folder / "results.json",
            {
                "protocol": asdict(protocol),
                "prompts": count,
                "reference_pictures": total,
                "run": described,
                "points": [m.row() for m in measured],
                "best": best_points(measured),
            },
        )
        write_sweep_plot(folder / "sweep.png", protocol.name, [m.row() for m in measured])
    return measured


def best_points(measured: Sequence[Measured]) -> dict[str, str]:
    """For each knowledge base the point of the lowest FID (CMMD where there is none): what the paper reports."""
    best: dict[str, Measured] = {}
    for each in measured:
        if each.point.label not in best or _cost(each) < _cost(best[each.point.label]):
            best[each.point.label] = each
    return {label: each.point.name for label, each in best.items()}


def _cost(measured: Measured) -> float:
    return measured.scores.cmmd if measured.scores.fid is None else measured.scores.fid


def _begin(folder: Path, described: dict[str, Any]) -> None:
    path = folder / "run.json"
    if not path.exists():
        write_json(path, described)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"out: {path} is not JSON ({error})") from None
    now = json.loads(json.dumps(described))
    for name in sorted(set(there) | set(now)):
        if there.get(name) != now.get(name):
            raise ValueError(f"out: {path}: {name} is {there.get(name)!r}, and {now.get(name)!r} is asked for")
