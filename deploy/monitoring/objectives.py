"""The objectives (SLOs), and the rules that follow from them: errors by window, how much is allowed, how fast it is burnt.

Multi-window, multi-burn-rate alerts as in chapter 5 of The Site Reliability Workbook (Google, 2018): an alert looks at a long
window, so that a moment does not call anybody, and at a short one, so that it ends soon after the errors do. With little
traffic one failure is a large share of either: nobody is woken for less than `LEAST_BAD` in the short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Rule = dict[str, Any]

WINDOW = "30d"
LEAST_BAD = 3  # one order that fails, and the second try of whoever asked for it, are no pattern yet
ERRORS, BUDGET = "slo:reimagen_errors:ratio_rate", "slo:reimagen_error_budget:ratio"
NUM_ERRORS = "slo:reimagen_errors:increase"
STALE = "index:reimagen_retrieval_stale:bool"

_ENDED, _IN_TIME = "grpc_server_call_duration_seconds_count", "grpc_server_call_duration_seconds_bucket"
_LOOKUPS = 'grpc_method="reimagen.retrieval.v1.RetrievalService/Retrieve"'
_FAULTS = "UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One promise.

    Attributes:
        slo: its name, the label of its series.
        service: whose.
        target: share of what is asked for that has to be good, over `WINDOW`.
        errors: PromQL of the share that was not, over the window `{window}`.
        num_errors: PromQL of how many were not, likewise.
    """

    slo: str
    service: str
    target: float
    errors: str
    num_errors: str


@dataclass(frozen=True, kw_only=True)
class BurnRate:
    """One alert: both windows burn the budget at least so many times as fast as the objective allows.

    Attributes:
        least: how much has to be bad in the short window; 0: any.
    """

    alert: str
    severity: str
    rate: float
    long: str
    short: str
    spent: str
    least: int = 0


OBJECTIVES = (
    Objective(
        slo="generator-availability",
        service="generator",
        target=0.995,
        errors='sum(rate(reimagen_generator_requests_total{{outcome=~"rejected|deadline|error"}}[{window}]))'
        ' / sum(rate(reimagen_generator_requests_total{{outcome=~"ok|rejected|deadline|error"}}[{window}]))',
        num_errors='sum(increase(reimagen_generator_requests_total{{outcome=~"rejected|deadline|error"}}[{window}]))',
    ),
    Objective(
        slo="generator-latency",
        service="generator",
        target=0.95,
        errors='1 - sum(rate(reimagen_generator_request_slowdown_ratio_bucket{{le="4.0"}}[{window}]))'
        " / sum(rate(reimagen_generator_request_slowdown_ratio_count[{window}]))",
        num_errors="sum(increase(reimagen_generator_request_slowdown_ratio_count[{window}]))"
        ' - sum(increase(reimagen_generator_request_slowdown_ratio_bucket{{le="4.0"}}[{window}]))',
    ),
    Objective(
        slo="retrieval-availability",
        service="retrieval",
        target=0.999,
        errors=f'sum(rate({_ENDED}{{{{{_LOOKUPS}, grpc_status=~"{_FAULTS}"}}}}[{{window}}]))'
        f' / sum(rate({_ENDED}{{{{{_LOOKUPS}, grpc_status=~"OK|{_FAULTS}"}}}}[{{window}}]))',
        num_errors=f'sum(increase({_ENDED}{{{{{_LOOKUPS}, grpc_status=~"{_FAULTS}"}}}}[{{window}}]))',
    ),
    Objective(
        slo="retrieval-latency",
        service="retrieval",
        target=0.99,
        errors=f'1 - sum(rate({_IN_TIME}{{{{{_LOOKUPS}, grpc_status="OK", le="0.1"}}}}[{{window}}]))'
        f' / sum(rate({_ENDED}{{{{{_LOOKUPS}, grpc_status="OK"}}}}[{{window}}]))',
        num_errors=f'sum(increase({_ENDED}{{{{{_LOOKUPS}, grpc_status="OK"}}}}[{{window}}]))'
        f' - sum(increase({_IN_TIME}{{{{{_LOOKUPS}, grpc_status="OK", le="0.1"}}}}[{{window}}]))',
    ),
    Objective(
        slo="retrieval-freshness",
        service="retrieval",
        target=0.99,
        # moments over moments: a mean of means would count a replica of two minutes like one of an hour
        errors=f"sum(sum_over_time({STALE}[{{window}}])) / sum(count_over_time({STALE}[{{window}}]))",
        num_errors=f"sum(sum_over_time({STALE}[{{window}}]))",
    ),
)

BURN_RATES = (
    BurnRate(
        alert="ErrorBudgetBurnsFast", severity="page", rate=14.4, long="1h", short="5m", spent="in an hour 2 %", least=LEAST_BAD
    ),
    BurnRate(
        alert="ErrorBudgetBurns", severity="page", rate=6, long="6h", short="30m", spent="in six hours 5 %", least=LEAST_BAD
    ),
    BurnRate(alert="ErrorBudgetBurnsSlowly", severity="ticket", rate=1, long="3d", short="6h", spent="in three days 10 %"),
)  # fmt: skip


def windows() -> tuple[str, ...]:
    """Those over which errors are recorded, the shortest first."""
    return tuple(dict.fromkeys([*(each.short for each in BURN_RATES), *(each.long for each in BURN_RATES)]))


def groups() -> list[Rule]:
    """The groups of a rules file."""
    return [
        {"name": "reimagen-objectives", "interval": "30s", "rules": list(_recorded())},
        {"name": "reimagen-error-budgets", "rules": list(_alerts())},
    ]


def _recorded() -> Iterator[Rule]:
    yield {
        "record": STALE,
        "expr": "reimagen_retrieval_index_generation_timestamp_seconds offset 1m"
        " > bool reimagen_retrieval_index_seen_timestamp_seconds",
    }
    for each in OBJECTIVES:
        yield {"record": BUDGET, "labels": _labels(each), "expr": f"vector({1 - each.target:.6g})"}
        for window in windows():
            yield {"record": ERRORS + window, "labels": _labels(each), "expr": each.errors.format(window=window)}
        for window in (rate.short for rate in BURN_RATES if rate.least):
            # rounded: an increase is extrapolated, two errors to a little more than two
            counted = f"round({each.num_errors.format(window=window)})"
            yield {"record": NUM_ERRORS + window, "labels": _labels(each), "expr": counted}


def _alerts() -> Iterator[Rule]:
    for each in BURN_RATES:
        yield {
            "alert": each.alert,
            "expr": f"{ERRORS}{each.long} > {each.rate:g} * {BUDGET} and {ERRORS}{each.short} > {each.rate:g} * {BUDGET}"
            + (f" and {NUM_ERRORS}{each.short} >= {each.least}" if each.least else ""),
            "labels": {"severity": each.severity},
            "annotations": {
                "summary": "{{ $labels.slo }}: the error budget burns " + _pace(each.rate),
                "description": "{{ $value | humanizePercentage }} of what was asked for was bad over "
                + f"{each.long}. At {each.rate:g} times the allowed rate {each.spent} of what {WINDOW} allow is gone.",
                "runbook_url": f"deploy/monitoring/runbooks.md#{each.alert.lower()}",
            },
        }


def _pace(rate: float) -> str:
    return "too fast" if rate == 1 else f"more than {rate:g} times too fast"


def _labels(objective: Objective) -> dict[str, str]:
    return {"slo": objective.slo, "service": objective.service}
