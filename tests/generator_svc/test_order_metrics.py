"""How orders end, and how long they took, as Prometheus is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from client.generator import GenerationFailed, GeneratorClient
from common.service.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from generator_svc.call import Call
from generator_svc.metrics import OUTCOMES, GeneratorMetrics, outcome_of
from tests.generator_svc.asking import QUICK, draw
from tests.generator_svc.tiny_stack import Service

REQUESTS, DURATION = "reimagen_generator_requests_total", "reimagen_generator_request_duration_seconds_count"
PREVIEWS = "reimagen_generator_time_to_first_preview_seconds_count"
SLOWDOWN = "reimagen_generator_request_slowdown_ratio_count"


def late() -> Call:
    return Call(time_remaining_s=lambda: -0.1)


@pytest.mark.parametrize(
    ("error", "call", "outcome"),
    [
        (asyncio.CancelledError(), Call(), "cancelled"),
        (GeneratorExit(), Call(time_remaining_s=lambda: 1.0), "cancelled"),
        (asyncio.CancelledError(), late(), "deadline"),
        (DeadlineExceeded("x"), late(), "deadline"),
        (DeadlineExceeded("x", reason="DEADLINE_TOO_SHORT"), Call(), "too_short"),
        (ResourceExhausted("x", reason="QUEUE_FULL"), Call(), "rejected"),
        (Unavailable("x", reason="DRAINING"), Call(), "rejected"),
        (Unavailable("x"), Call(), "error"),
        (InvalidArgument("k", "x"), Call(), "invalid"),
        (NotFound("x"), Call(), "invalid"),
        (FailedPrecondition("x"), Call(), "invalid"),
        (RuntimeError("a fault of ours"), Call(), "error"),
    ],
)
def test_how_an_order_ended(error: BaseException, call: Call, outcome: str) -> None:
    assert outcome_of(error, call) == outcome
    registry = CollectorRegistry()
    metrics = GeneratorMetrics(registry)

    def draw_in_vain() -> None:
        with metrics.order("high", call) as clock:
            clock.resolution = 256
            clock.alone_s = 1.0
            raise error

    with pytest.raises(type(error)):
        draw_in_vain()
    for each in OUTCOMES:
        counted = registry.get_sample_value(REQUESTS, {"outcome": each, "priority": "high"})
        assert counted == (1 if each == outcome else 0)
    assert registry.get_sample_value(DURATION, {"outcome": outcome, "resolution": "256"}) == 1
    assert registry.get_sample_value(SLOWDOWN) == 0, "of those that are drawn alone"


def test_slowdown_is_over_the_time_alone() -> None:
    registry = CollectorRegistry()
    metrics = GeneratorMetrics(registry)
    with metrics.order("normal", Call()) as clock:
        clock.alone_s = 1e-9
        clock.previewed()
        clock.previewed()
    with metrics.order("normal", Call()):
        pass
    assert registry.get_sample_value(SLOWDOWN) == 1, "not where nothing is known"
    assert registry.get_sample_value("reimagen_generator_request_slowdown_ratio_bucket", {"le": "32.0"}) == 0
    assert registry.get_sample_value(PREVIEWS) == 1


def test_orders_of_a_running_generator_are_told(client: GeneratorClient, generator: Service) -> None:
    def told() -> list[float]:
        return [
            generator.figure(REQUESTS, outcome="ok", priority="normal"),
            generator.figure(DURATION, outcome="ok", resolution=64),
            generator.figure(PREVIEWS),
            generator.figure(REQUESTS, outcome="invalid", priority="normal"),
        ]

    before = told()
    draw(client, replace(QUICK, preview_every=1))
    with pytest.raises(GenerationFailed):
        draw(client, replace(QUICK, knowledge_base="nobody-s"))
    assert [now - then for now, then in zip(told(), before, strict=True)] == [1, 1, 1, 1]
