"""What autoscalers ask: metrics that there are, answers that promtool gives to made-up figures, replicas that follow.

test_local_up asks the same of the Prometheus of a running stack.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from common.stages import STAGES
from tests.deploy.monitoring.autoscalers import demands
from tests.deploy.monitoring.metrics_page import documented
from tests.deploy.monitoring.test_rules import family, tool

FLIGHT, DEPTH = "reimagen_generator_in_flight_requests", "reimagen_generator_queue_depth"
CALLS, WAITED = "reimagen_server_calls_in_flight", "reimagen_generator_queue_wait_seconds_bucket"
STAGE = "reimagen_generator_triton_in_flight"
RETRIEVE = "reimagen.retrieval.v1.RetrievalService/Retrieve"
UP = {'up{job="generator",instance="a"}': "1x20", 'up{job="retrieval",instance="b"}': "1x20"}
BUSY = UP | {
    FLIGHT + '{instance="a",priority="normal"}': "5x20",
    FLIGHT + '{instance="a",priority="high"}': "3x20",
    FLIGHT + '{instance="c",priority="normal"}': "8x20",
    DEPTH + '{instance="a",priority="normal"}': "10x20",
    DEPTH + '{instance="c",priority="normal"}': "6x20",
    WAITED + '{instance="a",le="10"}': "0+0x20",
    WAITED + '{instance="a",le="20"}': "0+60x20",
    WAITED + '{instance="a",le="+Inf"}': "0+60x20",
    STAGE + '{instance="a",model="unet_256",endpoint="t:8001"}': "9x20",
    STAGE + '{instance="c",model="unet_256",endpoint="t:8001"}': "8x20",
    STAGE + '{instance="a",model="unet_1024",endpoint="u:8001"}': "8x20",
    CALLS + f'{{job="retrieval",instance="b",grpc_method="{RETRIEVE}"}}': "6x20",
    CALLS + f'{{job="retrieval",instance="d",grpc_method="{RETRIEVE}"}}': "4x20",
    CALLS + '{job="retrieval",instance="b",grpc_method="grpc.health.v1.Health/Watch"}': "50x20",
    CALLS + f'{{job="generator",instance="a",grpc_method="{RETRIEVE}"}}': "90x20",
}
# What Prometheus has: (by workload and name of the question) its answer, None for none, and the replicas of now and then.
CASES = {
    "busy": (
        BUSY,
        {
            ("triton", "orders"): (32.0, 2, 4),
            ("triton", "waiting"): (19.5, 2, 4),
            ("generator", "drawn"): (16.0, 2, 3),
            ("retrieval", "lookups"): (10.0, 2, 3),
            ("triton-unet-256", "pictures"): (17.0, 1, 3),
            ("triton-unet-1024", "pictures"): (8.0, 1, 1),
        },
    ),
    "nobody asks": (
        UP,
        {
            ("triton", "orders"): (0.0, 3, 1),
            ("triton", "waiting"): (0.0, 3, 1),
            ("generator", "drawn"): (0.0, 4, 2),
            ("retrieval", "lookups"): (0.0, 4, 2),
            ("triton-unet-256", "pictures"): (0.0, 2, 1),
            ("triton-unet-1024", "pictures"): (0.0, 2, 1),
        },
    ),
    "nothing is scraped": ({name: "0x20" for name in UP}, dict.fromkeys([(d.workload, d.name) for d in demands()])),
}


def test_queries_ask_for_metrics_that_are_documented() -> None:
    known, asked = {metric.name for metric in documented()}, set()
    for demand in demands():
        expression = re.sub(r"\{[^}]*\}", "", demand.query)
        asked |= set(re.findall(r"\b(?:reimagen|grpc|nv)_\w+|\bup\b", expression))
    assert len(asked) == 6
    assert {family(name) for name in asked} <= known
    stages = {f"triton-{spec.name.replace('_', '-')}" for spec in STAGES[1:]}
    assert {demand.workload for demand in demands()} == {"triton", "generator", "retrieval"} | stages


@pytest.mark.parametrize("case", CASES)
def test_prometheus_answers_and_replicas_follow(case: str, tmp_path: Path) -> None:
    figures, expected = CASES[case]
    assert set(expected) == {(demand.workload, demand.name) for demand in demands()}
    asked = []
    for demand in demands():
        answer = expected[demand.workload, demand.name]
        samples = [] if answer is None else [{"labels": "{}", "value": answer[0]}]
        asked.append({"expr": demand.query, "eval_time": "15m", "exp_samples": samples})
        if answer is not None:
            value, now, then = answer
            assert demand.replicas(value, now) == then, demand
    series = [{"series": name, "values": values} for name, values in figures.items()]
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": asked}]
    path = tmp_path / "autoscalers.yaml"
    path.write_text(yaml.safe_dump({"tests": tests}))
    tool("promtool", "test", "rules", path)
