"""What is promised, as the dashboards ask for it: the objectives and the recorded series of the rules."""

from __future__ import annotations

from deploy.monitoring.dashboards.description import Query, Variable
from deploy.monitoring.dashboards.promql import Selection
from deploy.monitoring.objectives import BUDGET, BURN_RATES, ERRORS, OBJECTIVES

ALL = Selection(matchers='namespace=~"$namespace"')
NAMESPACE = Variable(
    name="namespace",
    label="Namespace",
    metric="reimagen_build_info",
    described="Of the stack; a stack outside of Kubernetes has none, and is shown with All.",
)
ORDERS, ORDER_TIME = "reimagen_generator_requests_total", "reimagen_generator_request_duration_seconds"
LOOKUPS = "reimagen_retrieval_requests_total"
CALLS = "grpc_server_call_duration_seconds"
LOOKED_UP = 'grpc_method=~"reimagen.retrieval.v1.RetrievalService/.*Retrieve"'
BURN_ALERTS = tuple(each.alert for each in BURN_RATES)
FASTEST = max(BURN_RATES, key=lambda each: each.rate)
_BY_NAME = {each.slo: each for each in OBJECTIVES}


def target(slo: str) -> float:
    """Share of what is asked for that has to be good."""
    return _BY_NAME[slo].target


def kept(slo: str, window: str) -> str:
    """The share that was good over a window; 1 where nothing was asked for, of which the share is not a number."""
    return f"1 - ((({_BY_NAME[slo].errors.format(window=window)}) >= 0) or vector(0))"


def burns() -> tuple[Query, ...]:
    """How many times faster than allowed errors come, over the windows of the fastest alert."""
    return tuple(
        Query(expr=f"{ERRORS}{window} / on(slo) group_left() {BUDGET}", legend=f"{{{{slo}}}} over {window}")
        for window in (FASTEST.short, FASTEST.long)
    )
