"""Calls to a real Triton that an Envoy refuses at random: what succeeds all the same, and what that adds to the load.

Where each attempt fails with 0.3, 97 % of successes cost at least 0.97 / 0.7 = 1.39 attempts a request, whoever makes
them; what reaches Triton is the part that Envoy lets through. When everything fails, next to nothing is sent again.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from common.service.errors import DeadlineExceeded, Unavailable
from deploy.local.tritonserver import TritonServer
from generator_svc.call import Call
from tests.generator_svc.envoy import running_envoy
from tests.generator_svc.served import Asked, asked
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import Host

ORDERS, AT_ONCE, SHARE = 300, 8, 30
SHORT = plans(64, 7, 2), text_inputs(3, 2)
ATTEMPTS = "reimagen_generator_triton_attempts_total"


async def drawn(asking: Asked, orders: int, deadline_s: float) -> int:
    """How many of these orders, some at a time, are drawn; the others end with a documented code."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> bool:
        async with room:
            try:
                until = time.monotonic() + deadline_s
                await asking.draw(*SHORT, call=Call(time_remaining_s=lambda: until - time.monotonic()))
            except (DeadlineExceeded, Unavailable):
                return False
            return True

    return sum(await asyncio.gather(*(one() for _ in range(orders))))


def test_a_third_of_the_calls_is_refused(host: Host, triton_server: TritonServer, tmp_path: Path) -> None:
    with running_envoy(triton_server.address, tmp_path) as envoy:

        async def ask() -> None:
            async with asked(64, envoy.address) as asking:
                await asyncio.to_thread(envoy.set_share, SHARE)
                good = await drawn(asking, ORDERS, 30.0)
                attempts = asking.figure(ATTEMPTS)
                reached = await asyncio.to_thread(envoy.count, "cluster.triton.upstream_rq_total")
                refused = await asyncio.to_thread(envoy.count, "aborts_injected")
                print(
                    f"\n{good} of {ORDERS} drawn; {attempts / ORDERS:.2f} attempts a request, {reached / ORDERS:.2f} of"
                    f" them and of the canaries reached Triton, {refused} were refused"
                )
                assert good >= 0.97 * ORDERS
                assert attempts <= 1.2 * ORDERS / (1 - SHARE / 100), "more than the failures make necessary"
                assert reached <= 1.2 * ORDERS, "amplification at Triton"

        host.call(ask(), timeout_s=120.0)


def test_all_calls_are_refused(host: Host, triton_server: TritonServer, tmp_path: Path) -> None:
    with running_envoy(triton_server.address, tmp_path) as envoy:

        async def ask() -> None:
            async with asked(64, envoy.address) as asking:
                await asyncio.to_thread(envoy.set_share, 100)
                good = await drawn(asking, ORDERS, 1.0)
                attempts = asking.figure(ATTEMPTS)
                print(f"\n{good} of {ORDERS} drawn, {attempts / ORDERS:.2f} attempts a request")
                assert good == 0
                assert attempts <= 1.2 * ORDERS
                await asyncio.to_thread(envoy.set_share, 0)
                await asking.until(lambda: bool(asking.in_use), 10.0)
                await asking.draw(*SHORT)

        host.call(ask(), timeout_s=120.0)
