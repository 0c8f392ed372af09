"""The dashboards as they are committed: what the description gives, whole, linked, and bound to nothing of ours."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from deploy.local.children import ROOT
from deploy.monitoring.dashboards.__main__ import main
from deploy.monitoring.dashboards.boards import BOARDS, FOLDER, json_path, picture_path
from deploy.monitoring.dashboards.description import WIDTH, Board, Color, Kind, Panel, Place, Row, Unit, places
from deploy.monitoring.dashboards.drawing import Answered, key, picture, reached
from deploy.monitoring.dashboards.grafana import DATASOURCE, to_json
from deploy.monitoring.dashboards.live.check import metrics_of, substituted
from deploy.monitoring.dashboards.live.prometheus import RULES, Series
from deploy.monitoring.dashboards.units import spoken
from tests.deploy.k8s.rendering import kustomize

MONITORING = ROOT / "deploy" / "monitoring"
MOST_BYTES = 250_000  # kubectl keeps what it applied in an annotation, which holds no more than 262144
MOST_PICTURE_BYTES = 300_000
PANELS = [pytest.param(board, panel, id=f"{board.name}: {panel.title}") for board in BOARDS for panel in board.panels]


def parsed(board: Board) -> dict[str, Any]:
    return json.loads(json_path(board).read_text())


def panels(board: Board) -> list[dict[str, Any]]:
    return [panel for panel in parsed(board)["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_what_is_committed_is_what_the_description_gives(board: Board) -> None:
    assert json_path(board).read_text() == to_json(board), "run `make dashboards`"


def test_there_is_no_other_dashboard() -> None:
    assert sorted(FOLDER.glob("*.json")) == sorted(json_path(board) for board in BOARDS)
    assert [board.name for board in BOARDS] == ["overview", "generation", "retrieval", "triton", "training", "gpu"]
    assert len({board.uid for board in BOARDS}) == len(BOARDS)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_it_asks_the_chosen_data_source_alone(board: Board) -> None:
    written = json_path(board).read_text()
    assert set(re.findall(r'"uid": "([^"]*)"', written)) == {board.uid, f"${{{DATASOURCE}}}"}
    first = parsed(board)["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"]) == (DATASOURCE, "datasource", "prometheus")
    assert not first.get("current")


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_every_panel_has_a_title_a_description_and_a_unit(board: Board) -> None:
    titles = [panel["title"] for panel in panels(board)]
    for panel in panels(board):
        assert panel["title"] and len(panel["description"]) > 10 and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"]
            assert [target["format"] for target in panel["targets"]] == ["heatmap"]
    rows = [(row.title, panel.title) for row in board.rows for panel in row.panels]
    assert len(rows) == len(set(rows)) == len(titles)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_every_variable_is_used_and_every_used_one_is_there(board: Board) -> None:
    expressions = " ".join(query.expr for panel in board.panels for query in panel.queries)
    used = set(re.findall(r"\$(\w+)", expressions)) - {"__rate_interval", "__range"}
    assert used == {variable.name for variable in board.variables}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_nothing_lies_over_anything_else(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for _, place in places(board):
        cells = {(x, y) for x in range(place.x, place.x + place.width) for y in range(place.y, place.y + place.height)}
        assert place.x + place.width <= WIDTH and not cells & taken
        taken |= cells
    assert next(place for item, place in places(board) if isinstance(item, Row)) == Place(
        x=0, y=0, width=WIDTH, height=1
    )


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_percentiles_come_from_histograms_and_averages_are_no_latency(board: Board, panel: Panel) -> None:
    for query in panel.queries:
        if re.search(r"\bp\d\d", query.legend):
            assert re.match(r"histogram_quantile\(0\.\d+, sum by \(le[,)]", query.expr)
            assert re.search(r"rate\(\w+_bucket\{", query.expr)
        if panel.kind is Kind.HEAT:
            assert query.expr.startswith("sum by (le)(increase(")


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_labels_of_a_legend_are_those_that_the_query_leaves(board: Board, panel: Panel) -> None:
    for query in panel.queries:
        labels = set(re.findall(r"{{(\w+)}}", query.legend))
        grouped = re.match(r"(?:\w+\([\d., ]*)?(?:sum|max|min|avg|count)(?: by \(([\w,]+)\))?\s*\(", query.expr)
        if grouped:
            assert labels <= set((grouped[1] or "").split(","))


@pytest.mark.parametrize(("board", "panel"), PANELS)
def test_steps_rise_and_end_in_one_color(board: Board, panel: Panel) -> None:
    values = [step.value for step in panel.steps]
    assert values == sorted(set(values))


def test_every_alert_that_a_panel_names_is_a_rule_with_a_runbook() -> None:
    rules = [
        rule
        for path in RULES.glob("*.yaml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
    runbooks = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules if "alert" in rule}
    named = {alert for board in BOARDS for panel in board.panels for alert in panel.alerts}
    assert named <= set(runbooks)
    for alert in named:
        page, _, anchor = runbooks[alert].partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
        assert anchor in [re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings]
    links = {link["url"] for board in BOARDS for panel in panels(board) for link in panel.get("links", ())}
    assert links == {f"${{runbooks}}#{alert.lower()}" for alert in named}


def test_every_metric_is_listed_among_the_metrics() -> None:
    listed = set(re.findall(r"`(\w+)`", (MONITORING / "METRICS.md").read_text()))
    own = re.compile(r"(reimagen|grpc|nv)_")
    for board in BOARDS:
        for panel in board.panels:
            for query in panel.queries:
                for name in filter(own.match, metrics_of(query.expr)):
                    assert listed & {name, re.sub(r"_(bucket|sum|count)$", "", name)}, f"{panel.title}: {name}"


def test_windows_and_variables_are_put_in() -> None:
    asked = substituted('sum(rate(a_total{job=~"$job"}[$__rate_interval])) / $__range', rate_s=20, range_s=300)
    assert asked == 'sum(rate(a_total{job=~".*"}[20s])) / 300s'


def test_grafana_finds_them_in_the_cluster() -> None:
    maps = {each["metadata"]["name"]: each for each in kustomize(MONITORING / "dashboards")}
    assert set(maps) == {f"dashboard-{board.name}" for board in BOARDS}
    for board in BOARDS:
        found = maps[f"dashboard-{board.name}"]
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert found["data"] == {f"{board.name}.json": json_path(board).read_text()}
        assert len(json.dumps(found)) < MOST_BYTES


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_readme_shows_its_picture(board: Board) -> None:
    picture = picture_path(board)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < MOST_PICTURE_BYTES
    assert f"]({picture.name})" in (FOLDER / "README.md").read_text()


def test_write_gives_links_to_runbooks_of_ones_own(tmp_path: Path) -> None:
    page = "https://git.example.org/runbooks.md"
    assert main(["write", "--out", str(tmp_path), "--runbooks", page]) == 0
    for board in BOARDS:
        last = json.loads((tmp_path / f"{board.name}.json").read_text())["templating"]["list"][-1]
        assert (last["name"], last["query"]) == ("runbooks", page)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0123, Unit.SECONDS, "12.3 ms"),
        (5400.0, Unit.SECONDS, "1.5 h"),
        (0.995, Unit.RATIO, "99.5 %"),
        (3.5 * (1 << 20), Unit.BYTES, "3.5 MiB"),
        (1500.0, Unit.PER_SECOND, "1.5K/s"),
        (1.98e9, Unit.HERTZ, "1.98 GHz"),
        (math.nan, Unit.SECONDS, "-"),
    ],
)
def test_values_are_spoken_with_their_unit(value: float, unit: Unit, said: str) -> None:
    assert spoken(value, unit) == said


def test_a_stat_takes_the_color_of_the_step_that_it_has_reached() -> None:
    kept = next(panel for panel in BOARDS[0].panels if panel.title == "Drawn")
    assert [reached(kept, value) for value in (0.9, 0.991, 0.995)] == [Color.RED, Color.ORANGE, Color.GREEN]
    down = next(panel for panel in BOARDS[0].panels if panel.title == "Targets down")
    assert [reached(down, value) for value in (0, 1)] == [Color.GREEN, Color.RED]
    colors = [step["color"] for step in panels(BOARDS[0])[0]["fieldConfig"]["defaults"]["thresholds"]["steps"]]
    assert colors == ["red", "orange", "green"]


def test_panels_are_drawn_of_what_queries_gave_and_say_where_there_is_nothing() -> None:
    board = BOARDS[0]
    series = Series(labels={"outcome": "ok", "le": "0.5"}, times=(0.0, 5.0, 10.0), values=(0.1, math.nan, 0.3))
    for given in ([], [series]):
        answers = {
            key(board, place): [Answered(query=query, series=given) for query in item.queries]
            for item, place in places(board)
            if isinstance(item, Panel)
        }
        drawn = picture(board, answers, 0.0, 10.0, "a caption")
        assert Image.open(io.BytesIO(drawn)).size[0] > 1500
