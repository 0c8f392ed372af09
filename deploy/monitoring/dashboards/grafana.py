"""A described dashboard as Grafana's JSON, built with Grafana's own library, which knows the schema."""

from __future__ import annotations

import json
from collections.abc import Sequence

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat_shapes
from grafana_foundation_sdk.models import prometheus as query_shapes

from deploy.monitoring.dashboards.description import Board, Color, Kind, Panel, Place, Query, Row, Step, Unit, places
from deploy.monitoring.dashboards.description import Variable as Described

DATASOURCE, RUNBOOKS = "datasource", "runbooks"
ALL = ".*"  # of a variable: series without the label are among them
TAG = "reimagen"
SOURCE = model.DataSourceRef(type_val="prometheus", uid=f"${{{DATASOURCE}}}")
DEFAULT_RUNBOOKS = "https://example.com/reimagen/deploy/monitoring/runbooks.md"
_Graph = timeseries.Panel | stat.Panel | heatmap.Panel


def to_json(board: Board, *, runbooks: str = DEFAULT_RUNBOOKS) -> str:
    """The file of a dashboard, whose links to runbooks go to that page; the same description gives the same bytes."""
    return json.dumps(_built(board, runbooks).build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _built(board: Board, runbooks: str) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(f"Re-Imagen / {board.title}")
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .link(_siblings())
        .with_variable(dashboard.DatasourceVariable(DATASOURCE).label("Prometheus").type("prometheus"))
    )
    for variable in board.variables:
        made = made.with_variable(_variable(variable))
    made = made.with_variable(_runbooks(runbooks))
    for number, (item, place) in enumerate(places(board), start=1):
        if isinstance(item, Row):
            made = made.with_row(dashboard.Row(item.title).id(number).grid_pos(_grid(place)))
        else:
            made = made.with_panel(_panel(item).id(number).grid_pos(_grid(place)))
    return made


def _siblings() -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink("Re-Imagen")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .keep_time(True)
        .include_vars(True)
    )


def _variable(variable: Described) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.described)
        .datasource(SOURCE)
        .query(f"label_values({variable.metric}, {variable.name})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )


def _runbooks(url: str) -> dashboard.TextBoxVariable:
    return (
        dashboard.TextBoxVariable(RUNBOOKS)
        .label("Runbooks")
        .description("Where the runbooks of this release are read; the panels' links go there.")
        .default_value(url)
        .hide(model.VariableHide.HIDE_VARIABLE)
    )


def _panel(panel: Panel) -> _Graph:
    made = {Kind.STAT: _stat, Kind.LINES: _lines, Kind.STACKED: _lines, Kind.HEAT: _heat}[panel.kind](panel)
    made = made.title(panel.title).description(panel.description).datasource(SOURCE)
    if panel.kind is not Kind.HEAT:  # whose unit is its axis'
        made = made.unit(panel.unit)
    if panel.alerts:
        made = made.links([_runbook(alert) for alert in panel.alerts])
    for number, query in enumerate(panel.queries):
        made = made.with_target(_target(query, chr(ord("A") + number), panel.kind))
    return made


def _runbook(alert: str) -> dashboard.DashboardLink:
    return (
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(model.DashboardLinkType.LINK)
        .url(f"${{{RUNBOOKS}}}#{alert.lower()}")
        .target_blank(True)
    )


def _target(query: Query, letter: str, kind: Kind) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).datasource(SOURCE)
    made = made.editor_mode(query_shapes.QueryEditorMode.CODE).range()
    return made.format(query_shapes.PromQueryFormat.HEATMAP) if kind is Kind.HEAT else made


def _stat(panel: Panel) -> stat.Panel:
    mode = shapes.BigValueColorMode.BACKGROUND if panel.steps else shapes.BigValueColorMode.NONE
    made = (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(shapes.BigValueGraphMode.AREA)
        .color_mode(mode)
        .thresholds(_thresholds(panel.steps))
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
    )
    return made.no_value(panel.at_rest) if panel.at_rest else made


def _lines(panel: Panel) -> timeseries.Panel:
    stacked = panel.kind is Kind.STACKED
    legend = common.VizLegendOptions().show_legend(True).placement(shapes.LegendPlacement.BOTTOM)
    made = (
        timeseries.Panel()
        .legend(legend.display_mode(shapes.LegendDisplayMode.TABLE).calcs(["mean", "max", "lastNotNull"]))
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
        .line_width(1)
        .fill_opacity(40 if stacked else 8)
        .show_points(shapes.VisibilityMode.AUTO)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
        .thresholds(_thresholds(panel.steps))
    )
    if panel.steps:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED))
    if stacked:
        made = made.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    if panel.logarithmic:
        scale = common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LOG).log(10)
        made = made.scale_distribution(scale)
    elif not panel.may_go_below_zero:
        made = made.min(0)
    return made.axis_soft_max(panel.top) if panel.top is not None else made


def _heat(panel: Panel) -> heatmap.Panel:
    color = heatmap.HeatmapColorOptions().mode(heat_shapes.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return (
        heatmap.Panel()
        .calculate(False)
        .color(color)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit).axis_placement(shapes.AxisPlacement.LEFT))
        .unit(Unit.COUNT)
        .show_legend()
    )


def _thresholds(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    first = Color.RED if steps and steps[-1].color is Color.GREEN else Color.GREEN
    made = [model.Threshold(value=None, color=first)]
    made += [model.Threshold(value=step.value, color=step.color) for step in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(made)


def _grid(place: Place) -> model.GridPos:
    return model.GridPos(x=place.x, y=place.y, w=place.width, h=place.height)
