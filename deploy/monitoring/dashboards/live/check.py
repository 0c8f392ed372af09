"""Whether every query of the dashboards says something."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.monitoring.dashboards.description import Board, Panel, Query
from deploy.monitoring.dashboards.live.prometheus import Prometheus, QueryFailed

_METRIC = re.compile(r"\b((?:reimagen|grpc|nv|DCGM|process|collection|kube|memory|cluster)_\w+)(?=[{\[])")
_VARIABLE = re.compile(r"\$(\w+)")
ALL = ".*"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one query.

    Attributes:
        num_series: with at least one number.
        fault: why that is not as it should be; empty where it is.
    """

    board: Board
    panel: Panel
    query: Query
    num_series: int
    fault: str


def substituted(expr: str, *, rate_s: float, range_s: float) -> str:
    """A query as Grafana sends it with all variables at All."""
    windows = {"__rate_interval": f"{max(1, round(rate_s))}s", "__range": f"{max(1, round(range_s))}s"}
    return _VARIABLE.sub(lambda match: windows.get(match[1], ALL), expr)


def check(boards: Sequence[Board], prometheus: Prometheus, *, rate_s: float, range_s: float) -> Iterator[Finding]:
    """Ask every query once, now.

    Args:
        rate_s: what `$__rate_interval` stands for: four scrapes or more.
        range_s: the time shown, which `$__range` stands for.
    """
    for board in boards:
        for panel in board.panels:
            for query in panel.queries:
                expr = substituted(query.expr, rate_s=rate_s, range_s=range_s)
                try:
                    found = [series for series in prometheus.at(expr, time.time()) if series.has_values]
                    fault = "" if found else _why_empty(query, prometheus)
                except QueryFailed as error:
                    found, fault = [], str(error)
                yield Finding(board=board, panel=panel, query=query, num_series=len(found), fault=fault)


def check_until(
    boards: Sequence[Board], prometheus: Prometheus, *, rate_s: float, patience_s: float, pause_s: float
) -> list[Finding]:
    """Ask until every query has found something once, or patience is at its end; gives the best of each."""
    give_up = time.monotonic() + patience_s
    best = list(check(boards, prometheus, rate_s=rate_s, range_s=rate_s))
    while any(finding.fault for finding in best) and time.monotonic() < give_up:
        time.sleep(pause_s)
        again = check(boards, prometheus, rate_s=rate_s, range_s=rate_s)
        best = [new if old.fault else old for old, new in zip(best, again, strict=True)]
    return best


def _why_empty(query: Query, prometheus: Prometheus) -> str:
    unknown = [name for name in metrics_of(query.expr) if not prometheus.knows(name)]
    if unknown:
        return f"nobody exports {', '.join(unknown)}"
    return "" if query.after else "no series with a number"


def metrics_of(expr: str) -> list[str]:
    """Names of the exported metrics in a query; those that rules record have colons, and are not among them."""
    return list(dict.fromkeys(_METRIC.findall(expr)))
