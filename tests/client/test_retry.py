"""What is tried again, and what is not: against a canned generator, whose faults a real one shows by chance alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from client import AsyncClient, Client, GenerationFailed, RetryPolicy
from tests.client.canned import CannedGenerator, Fault, bad_request, fails, retry_info, serving

QUICKLY = RetryPolicy(max_attempts=3, initial_backoff_s=0.01, max_backoff_s=0.02)
TIMEOUT_S = 20.0
AWAY = fails("UNAVAILABLE")

Ask = Callable[[str, str], Any]
"""Asks the service at an address by a method of the client, and gives the result."""


def ask(address: str, method: str, timeout_s: float = TIMEOUT_S) -> Any:
    """With `Client`."""
    with Client(address, retry=QUICKLY) as client:
        return getattr(client, method)("p", timeout_s=timeout_s)


def ask_async(address: str, method: str, timeout_s: float = TIMEOUT_S) -> Any:
    """With `AsyncClient`."""

    async def asked() -> Any:
        async with AsyncClient(address, retry=QUICKLY) as client:
            drawing: Awaitable[Any] = getattr(client, method)("p", timeout_s=timeout_s)
            return await drawing

    return asyncio.run(asked())


every_way = pytest.mark.parametrize("ask", [ask, ask_async], ids=["sync", "async"])
every_method = pytest.mark.parametrize("method", ["generate", "generate_images"])


@every_way
@every_method
def test_unavailable_before_the_first_event_is_tried_again_with_the_same_id(ask: Ask, method: str) -> None:
    service = CannedGenerator([AWAY, AWAY])
    with serving(service) as address:
        drawn = ask(address, method)
    assert (drawn.images[0].image, len(service.requests)) == (b"picture", 3)
    assert len({request.request_id for request in service.requests}) == 1, "the attempts name one request"


@every_way
def test_nothing_is_tried_again_once_there_was_an_event(ask: Ask) -> None:
    service = CannedGenerator([AWAY], num_before=1)
    with serving(service) as address, pytest.raises(GenerationFailed) as caught:
        ask(address, "generate")
    assert (caught.value.code, len(service.requests)) == ("UNAVAILABLE", 1)


@every_way
@every_method
@pytest.mark.parametrize(
    "fault",
    [
        fails("RESOURCE_EXHAUSTED", "full", retry_info(0.01)),
        fails("INTERNAL"),
        fails("INVALID_ARGUMENT", "no", bad_request("k", "too many")),
    ],
    ids=["full", "internal", "invalid"],
)
def test_other_failures_are_told_at_once(ask: Ask, method: str, fault: Fault) -> None:
    service = CannedGenerator([fault])
    with serving(service) as address, pytest.raises(GenerationFailed):
        ask(address, method)
    assert len(service.requests) == 1


@every_way
def test_attempts_end(ask: Ask) -> None:
    service = CannedGenerator([AWAY] * 9)
    with serving(service) as address, pytest.raises(GenerationFailed, match="canned"):
        ask(address, "generate")
    assert len(service.requests) == QUICKLY.max_attempts


@every_way
def test_the_service_says_when_to_come_back(ask: Ask) -> None:
    service = CannedGenerator([fails("UNAVAILABLE", "starting", retry_info(0.4))])
    started = time.monotonic()
    with serving(service) as address:
        ask(address, "generate")
    assert time.monotonic() - started > 0.4, "longer than the policy's own pause of 0.02 s at most"


def test_nobody_waits_beyond_the_deadline() -> None:
    service = CannedGenerator([fails("UNAVAILABLE", "starting", retry_info(0.9))] * 9)
    with serving(service) as address, pytest.raises(GenerationFailed) as caught:
        ask(address, "generate", timeout_s=0.8)
    assert (caught.value.code, caught.value.retry_after_s) == ("UNAVAILABLE", 0.9), "told at once"
    assert len(service.requests) == 1


def test_two_requests_have_two_ids_and_a_given_one_is_kept() -> None:
    service = CannedGenerator()
    with serving(service) as address, Client(address) as client:
        for request_id in ("", "", "4b9e0a0e-9d1a-4d5b-8a0b-0c5a9d5d3f11"):
            client.generate("p", request_id=request_id)
    first, second, third = (request.request_id for request in service.requests)
    assert first != second and third == "4b9e0a0e-9d1a-4d5b-8a0b-0c5a9d5d3f11"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_attempts": 0}, "max_attempts: 0 is less than 1"),
        ({"initial_backoff_s": -1.0}, "initial_backoff_s: -1.0 is not between 0 and"),
        ({"initial_backoff_s": 9.0}, "initial_backoff_s: 9.0 is not between 0 and"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RetryPolicy(**fields)
