"""Ablations and the report, whole, on the tiny stack."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from client import Client
from common.images import decode_rgb, encode_png
from evaluation.ablations.experiment import Places, draw_ablation, measure_ablation
from evaluation.ablations.rows import ABLATIONS, Ablation, Point, ablation
from evaluation.entitydraw.command import load_suite, measure
from evaluation.entitydraw.figures import FIGURES
from evaluation.entitydraw.requests import asked
from evaluation.entitydraw.results import RunError, RunFolder
from evaluation.entitydraw.runner import RunSettings, run_suite
from evaluation.entitydraw.scoring import Galleries
from evaluation.entitydraw.suite_file import Suite
from evaluation.entitydraw.systems import System
from evaluation.report.command import add_commands
from evaluation.report.page import Section, render
from evaluation.report.sections import ablation_sections, flat_section, run_section
from tests.evaluation.entitydraw.conftest import silent

RESULTS = Path(__file__).parents[3] / "evaluation" / "results" / "ablations"


def tiny(plot: str) -> Ablation:
    """Two systems, over two steps each."""
    return Ablation(
        name=f"tiny-{plot}",
        question="Do steps matter?",
        points=tuple(
            Point(system=System(name=f"{sampler}-{n}", sampler=sampler, steps=n), x=float(n), series=sampler)
            for sampler in ("ddim", "ddpm")
            for n in (1, 2)
        ),
        figures=("entity_r5", "text"),
        compared=(("ddim-1", "ddpm-1"),),
        plot=plot,  # type: ignore[arg-type]
        axis="steps",
        prompts=3,
        log_axis=plot == "lines",
        recommends=plot == "lines",
    )


@pytest.fixture(scope="module")
def places(suite: Suite, galleries: Galleries, drawing: Client, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Three ablations that were drawn: one of each plot, all of the same pictures."""
    folder = tmp_path_factory.mktemp("ablations")
    places = Places(run=folder / "run", out=folder / "out")
    draw_ablation(tiny("bars"), suite, drawing, places, 2, silent)
    for plot in ("bars", "lines", "tradeoff"):
        measure_ablation(tiny(plot), suite, galleries, places, silent)
    return places


@pytest.mark.parametrize("plot", ["bars", "lines", "tradeoff"])
def test_an_ablation_leaves_its_data_a_plot_and_a_sheet(plot: str, places: Places) -> None:
    written = json.loads((places.out / f"tiny-{plot}.json").read_text())
    assert set(written["systems"]) == {"ddim-1", "ddim-2", "ddpm-1", "ddpm-2"} == set(written["pictures_sha256"])
    assert written.get("recommended", {}).get("system", "") in (written["systems"] if plot == "lines" else ("",))
    assert [p["x"] for p in written["points"]] == [1.0, 2.0, 1.0, 2.0]
    assert [(c["first"], c["second"]) for c in written["comparisons"]] == [("ddim-1", "ddpm-1")]
    assert written["run"]["command"] == f"python -m evaluation ablation tiny-{plot} --generator HOST:PORT"
    picture = decode_rgb((places.out / f"tiny-{plot}.png").read_bytes())
    assert picture.shape[0] > 300 and picture.std() > 5
    assert decode_rgb((places.out / f"tiny-{plot}-sheet.png").read_bytes()).shape[0] > 300


def test_of_a_run_that_is_not_finished_what_all_systems_have_counts(
    places: Places, suite: Suite, galleries: Galleries, tmp_path: Path
) -> None:
    partly = Places(run=tmp_path / "run", out=tmp_path / "out")
    shutil.copytree(places.run, partly.run)
    row = next(row for row in RunFolder(places.run).rows() if row.system == "ddim-2")
    (partly.run / row.file).unlink()
    written = measure_ablation(tiny("bars"), suite, galleries, partly, silent)
    assert [found["pictures"] for found in written["systems"].values()] == [2, 2, 2, 2]
    none = replace(tiny("bars"), points=(Point(system=System(name="gone")),), compared=())
    with pytest.raises(RunError, match="holds no prompt that every system"):
        measure_ablation(none, suite, galleries, partly, silent)


def test_a_plot_of_the_same_figures_is_the_same_file(places: Places, suite: Suite, galleries: Galleries) -> None:
    before = (places.out / "tiny-lines.png").read_bytes()
    measure_ablation(tiny("lines"), suite, galleries, places, silent)
    assert (places.out / "tiny-lines.png").read_bytes() == before


@pytest.mark.parametrize("row", ABLATIONS, ids=lambda row: row.name)
def test_every_row_can_be_drawn(row: Ablation, suite: Suite) -> None:
    names = [system.name for system in row.systems]
    assert len(set(names)) == len(names)
    assert all(set(pair) <= set(names) for pair in row.compared) and row.compared
    assert set(row.figures) <= set(FIGURES)
    assert ablation(row.name) is row
    for system in row.systems:
        request = asked(suite, system, suite.prompts[0]).request((1, 2))
        assert request.stop_at == 64 and (request.k or request.without_neighbors or request.references)


def test_a_system_of_one_name_is_one_system() -> None:
    systems: dict[str, System] = {}
    for row in ABLATIONS:
        for system in row.systems:
            assert systems.setdefault(system.name, system) == system


def test_an_ablation_that_there_is_not_is_said() -> None:
    with pytest.raises(ValueError, match="ablation: 'x' is none of neighbors, "):
        ablation("x")


class Links(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_holds_everything_and_loads_nothing(
    drawn: RunFolder, suite: Suite, galleries: Galleries, places: Places, tmp_path: Path
) -> None:
    measure(drawn, suite, galleries, silent)
    (tmp_path / "flat.json").write_text('{"entity_r1": 0.5, "model": "<b>bold</b>"}')
    with pytest.raises(RunError, match=r"suite: 'tiny' of sha256 \w+ is not 'tiny' of 0{12}; name it with --suite"):
        run_section(drawn, replace(suite, sha256="0" * 64))
    sections = [run_section(drawn, suite), flat_section("Flat", "", tmp_path / "flat.json", [], "a command & more")]
    page = render("title", "about", sections)
    links = Links()
    links.feed(page)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links.loaded)
    assert not {"script", "link", "iframe", "object", "b"} & set(links.tags) and "url(" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page and "a command &amp; more" in page
    run = drawn.read_run()
    for stage in run["generator"]["stages"]:
        assert stage["weights_sha256"] in page
    assert suite.sha256 in page and run["command"] in page
    for system in run["systems"]:
        assert f"<td>{system}</td>" in page
    figure = json.loads(drawn.figures_file.read_text())["systems"]["given"]["all"]["entity_mrr"]
    assert f"{figure['estimate']:.3f}" in page and f"{figure['low']:.3f} to {figure['high']:.3f}" in page


def test_a_run_of_the_users_own_pictures_has_its_page(drawing: Client, tmp_path: Path) -> None:
    home = tmp_path / "mine" / "dogs" / "Chortai"
    home.mkdir(parents=True)
    (home / "1.png").write_bytes(encode_png(np.full((64, 64, 3), 90, np.uint8)))
    suite, folder = load_suite("entitydrawbench", tmp_path, tmp_path / "mine"), RunFolder(tmp_path / "run")
    given = System(name="given", neighbors="given", steps=1)
    run_suite(suite, [given], drawing, folder, RunSettings(prompts=1, pictures=1), silent)
    measure(folder, suite, Galleries(suite, {}), silent)
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    run = ["--run", str(folder.path), "--suite", "entitydrawbench", "--results", str(tmp_path)]
    flags = parser.parse_args(
        ["report", *run, "--references", str(tmp_path / "mine"), "--out", str(tmp_path / "page.html")]
    )
    flags.body(flags)
    assert "<td>given</td>" in (tmp_path / "page.html").read_text()


def test_ablations_are_shown_with_what_was_read_off_them(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(tiny("bars"), name="tiny-bars")
    monkeypatch.setattr("evaluation.report.sections.ABLATIONS", (row, replace(row, name="not-drawn")))
    (places.out / "findings.yaml").write_text("tiny-bars: Steps do not matter.\n")
    sections = ablation_sections(places.out)
    assert [section.title for section in sections] == ["Ablation: tiny-bars"]
    assert sections[0].finding == "Steps do not matter." and len(sections[0].tables) == 2
    page = render("t", "a", sections)
    assert "Steps do not matter." in page and re.search(r"pictures, sha256 over", page)


def test_anchors_are_plain() -> None:
    assert Section(title="Ablation: two-entities").anchor == "ablation-two-entities"


def test_the_committed_ablations_are_of_the_rows_that_there_are() -> None:
    written = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert len({found["run"]["suite"]["sha256"] for found in written.values()}) <= 1, "all are of one suite"
    for name, found in written.items():
        row = ablation(name)
        assert [point["system"] for point in found["points"]] == [system.to_json() for system in row.systems]
        assert (RESULTS / f"{name}.png").is_file() and (RESULTS / f"{name}-sheet.png").is_file()
