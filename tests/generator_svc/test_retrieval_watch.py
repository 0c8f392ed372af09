"""The generator's health follows retrieval where it draws nothing without it: real services over sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.generator import GeneratorClient
from common.service.errors import DeadlineExceeded, Unavailable
from deploy.local.knowledge_base import LIBRARY
from generator_svc.retrieval_watch import RetrievalWatch
from tests.generator_svc.asking import QUICK, draw, images
from tests.generator_svc.tiny_stack import Host, Service, retrieval_service, write_knowledge_base

NOT_SERVING_S, SERVING_S = 5.0, 10.0


def until_serving(client: GeneratorClient, serving: bool, timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while client.health()[0].is_serving != serving:
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return write_knowledge_base(tmp_path / "work") / LIBRARY  # nobody else has it open


def test_health_follows_retrieval(
    host: Host, make_generator: Callable[..., Service], library: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "retrieval.sock"
    service = make_generator(retrieval_address=f"unix:{socket}")
    with host.running(service) as address, GeneratorClient(address) as client:
        assert client.health()[0].status == "NOT_SERVING"
        with host.running(retrieval_service(library, socket)):
            until_serving(client, True, SERVING_S)
            assert images(draw(client, QUICK))
        until_serving(client, False, NOT_SERVING_S)
        time.sleep(4.0)  # gRPC's own pauses between connections would have grown past what is waited for below
        with host.running(retrieval_service(library, socket)):
            until_serving(client, True, SERVING_S)
            assert images(draw(client, QUICK))


def test_where_it_draws_without_retrieval_health_does_not(
    host: Host, make_generator: Callable[..., Service], tmp_path: Path
) -> None:
    service = make_generator(retrieval_address=f"unix:{tmp_path}/nobody.sock", without_retrieval="draw")
    with host.running(service) as address, GeneratorClient(address) as client:
        assert client.health()[0].is_serving


def test_silence_counts_when_it_lasts_and_a_refusal_at_once() -> None:
    class Scripted:
        answer: Exception | None = None

        async def check(self, *, timeout_s: float) -> None:
            if self.answer:
                raise self.answer

    async def ask() -> None:
        retrieval, told = Scripted(), []
        async with RetrievalWatch(retrieval, on_usable=told.append, interval_s=0.01, silent_s=0.5):
            assert told == [True]
            retrieval.answer = DeadlineExceeded("silent")
            await asyncio.sleep(0.2)
            assert told == [True]
            async with asyncio.timeout(10):
                while told != [True, False]:
                    await asyncio.sleep(0.01)
            retrieval.answer = None
            async with asyncio.timeout(10):
                while told != [True, False, True]:
                    await asyncio.sleep(0.01)
            retrieval.answer = Unavailable("refused")
            await asyncio.sleep(0.2)
            assert told == [True, False, True, False]

    asyncio.run(ask())
