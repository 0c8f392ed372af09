"""The report's sections, out of what runs, ablations and measurements have left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.images import contact_sheet, encode_png
from evaluation.ablations.experiment import neighbor_pictures, true_picture
from evaluation.ablations.plots import draw_plot
from evaluation.ablations.rows import ABLATIONS, Ablation, Point
from evaluation.entitydraw.figures import FIGURES
from evaluation.entitydraw.results import PictureRow, RunError, RunFolder
from evaluation.entitydraw.scoring import read_picture
from evaluation.entitydraw.suite_file import Suite
from evaluation.entitydraw.systems import system_of
from evaluation.report.page import Cell, Picture, Section, Table, cell, plain

SHEET_PROMPTS = 16
SHEET_CELL = 80
FINDINGS = "findings.yaml"


def run_section(folder: RunFolder, suite: Suite) -> Section:
    """A run: figures of its systems, over all and by part, and its first pictures.

    Raises:
        RunError: there is no such run, or it is of another suite.
    """
    run = folder.read_run()
    if run["suite"]["sha256"] != suite.sha256:
        raise RunError(
            f"run: {folder.run_file}: suite: {run['suite']['name']!r} of sha256 {run['suite']['sha256'][:12]} is not"
            f" {suite.name!r} of {suite.sha256[:12]}; name it with --suite"
        )
    figures = json.loads(folder.figures_file.read_text(encoding="utf-8"))
    systems: dict[str, Any] = figures["systems"]
    parts = sorted({part for found in systems.values() for part in found["parts"]})
    bars = Ablation(
        name="run",
        question="The best of each prompt's pictures shows the entity that is asked for",
        points=tuple(Point(system=system_of(run["systems"][name]), x=i) for i, name in enumerate(systems)),
        figures=("best_entity_r1",),
        compared=(),
        parts=tuple(parts),
    )
    per_part = tuple(
        Table(
            title=f"{FIGURES[name]} ({name}), by part",
            header=("part", *systems),
            rows=tuple(
                (plain(part), *(cell(found["parts"].get(part, {}).get(name)) for found in systems.values()))
                for part in parts
            ),
        )
        for name in ("best_entity_r1", "entity_r1")
    )
    return Section(
        title=f"EntityDrawBench: {run['suite']['name']}",
        text=f"{run['prompts']} prompts, {run['pictures']} pictures each, the same seeds for every system."
        f" {run['suite']['about']} Intervals: 95 %, bootstrap over prompts.",
        plots=(Picture(png=draw_plot(bars, systems), caption="by part"),),
        tables=(_figures_table(systems), *per_part, *_comparisons(figures["comparisons"])),
        sheets=(_run_sheet(folder, suite, list(systems)),),
        provenance=_run_provenance(run),
    )


def ablation_sections(results: Path) -> list[Section]:
    """The ablations that were drawn, in the order of their rows; what was read off them stands in findings.yaml."""
    findings: dict[str, str] = {}
    if (results / FINDINGS).is_file():
        findings = yaml.safe_load((results / FINDINGS).read_text(encoding="utf-8")) or {}
    sections: list[Section] = []
    for row in ABLATIONS:
        path = results / f"{row.name}.json"
        if path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
            sections.append(_ablation(row.name, written, results, findings.get(row.name, "")))
    return sections


def _ablation(name: str, written: Mapping[str, Any], results: Path, finding: str) -> Section:
    run = written["run"]
    plot, sheet = results / f"{name}.png", results / f"{name}-sheet.png"
    order = [point["system"]["name"] for point in written["points"]]
    systems = {system: written["systems"][system] for system in order if system in written["systems"]}
    pictures = next(iter(systems.values()))["pictures"]
    return Section(
        title=f"Ablation: {name}",
        text=f"{written['question']} {pictures} pictures a system, drawn on {run['started'][:10]}.",
        finding=finding,
        plots=(Picture(png=plot.read_bytes(), caption=written["question"]),),
        tables=(_figures_table(systems), *_comparisons(written["comparisons"])),
        sheets=(Picture(png=sheet.read_bytes(), caption="The first prompts by hash: neighbors, systems, asked for"),),
        provenance=_run_provenance(run, written["pictures_sha256"]),
    )


def flat_section(title: str, text: str, figures: Path, sheets: Sequence[Path], command: str) -> Section:
    """Figures of a flat JSON file, with sheets that belong to it."""
    said: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return Section(
        title=title,
        text=text,
        tables=(Table(header=("figure", "value"), rows=tuple((plain(n), plain(v)) for n, v in said.items())),),
        sheets=tuple(Picture(png=path.read_bytes(), caption=path.name) for path in sheets if path.is_file()),
        provenance=(("command", command),),
    )


def _figures_table(systems: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = [name for name in FIGURES if any(name in found["all"] for found in systems.values())]
    return Table(
        header=("system", *shown, "pictures"),
        rows=tuple(
            (plain(system), *(cell(found["all"].get(name)) for name in shown), plain(found["pictures"]))
            for system, found in systems.items()
        ),
    )


def _comparisons(compared: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    rows: list[tuple[Cell, ...]] = []
    for pair in compared:
        for name, said in pair.items():
            if name in ("first", "second"):
                continue
            better = f"{said['better']} / {said['worse']} / {said['tied']}"
            chances = (f"{said['p_difference']:.4f}", f"{said['p_sign']:.4f}")
            names = (plain(f"{pair['first']} less {pair['second']}"), plain(name))
            rows.append((*names, cell(said["difference"]), *(plain(text) for text in (*chances, better))))
    header = ("systems", "figure", "difference", "p (sign flips)", "p (sign test)", "better / worse / tied prompts")
    return (Table(title="On the same prompts and seeds", header=header, rows=tuple(rows)),) if rows else ()


def _run_sheet(folder: RunFolder, suite: Suite, systems: Sequence[str]) -> Picture:
    of: dict[tuple[str, str], list[PictureRow]] = {}
    for row in sorted(folder.rows(), key=lambda each: each.key):
        of.setdefault((row.system, row.prompt_id), []).append(row)
    prompts = [p for p in suite.part(0) if any((system, p.id) in of for system in systems)][:SHEET_PROMPTS]
    lines, labels = [], []
    for prompt in prompts:
        found = [row for system in systems for row in of.get((system, prompt.id), [])]
        shaped = next((row for row in found if row.neighbors), None)
        pictures = [read_picture(folder, row) for row in found]
        lines.append([*neighbor_pictures(folder, shaped), *pictures, true_picture(prompt)])
        labels.append(prompt.text)
    caption = f"The first prompts by hash: neighbors; every picture of {', then of '.join(systems)}; asked for"
    return Picture(png=encode_png(contact_sheet(lines, labels, cell=SHEET_CELL)), caption=caption)


def _run_provenance(
    run: Mapping[str, Any], pictures_sha256: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    weights = {f"unet_{m['stage']}": m["weights_sha256"] for m in run["generator"]["stages"]}
    said = {
        "command": run["command"],
        "drawn": f"{run['started']} to {run['finished']}",
        "suite": f"{run['suite']['file']}, sha256 {run['suite']['sha256']}",
        "weights, sha256": _shown(weights),
        "systems": "\n".join(json.dumps(row) for row in run["systems"].values()),
        "versions": _shown(run["versions"]),
    }
    if pictures_sha256:
        said["pictures, sha256 over their sha256s"] = _shown(pictures_sha256)
    return tuple(said.items())


def _shown(document: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in document.items())
