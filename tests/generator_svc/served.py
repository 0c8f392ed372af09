"""Stages at Tritons, as the tests of the generator's side ask them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
from prometheus_client import CollectorRegistry

from common.diffusion.plan import Plan
from common.stages import stage
from generator_svc.call import Call
from generator_svc.stage_backend import StageInfo, StageNeeds
from generator_svc.stage_inputs import StageInputs
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_endpoints import Credentials
from generator_svc.triton_metrics import TritonMetrics
from generator_svc.triton_stage import TritonStage

OPEN_S = 20.0
TIMEOUT_S = 60.0


class Asked:
    """A stage at some addresses, and what was counted about it."""

    def __init__(self, size: int, addresses: Sequence[str], policy: EndpointPolicy, credentials: Credentials) -> None:
        self.registry = CollectorRegistry()
        self.changed = asyncio.Event()
        self.stage = TritonStage(
            stage(size),
            addresses,
            policy=policy,
            metrics=TritonMetrics(self.registry),
            on_change=self.changed.set,
            credentials=credentials,
        )

    async def draw(
        self,
        plans: Sequence[Plan],
        inputs: StageInputs,
        *,
        on_step: Callable[[int, int, np.ndarray | None], None] = lambda picture, step, x0: None,
        preview_every: int = 0,
        call: Call | None = None,
    ) -> tuple[np.ndarray, StageInfo]:
        """An order's pictures, and what drew them."""
        async with self.stage.reserve(StageNeeds(num_pictures=len(plans), num_tokens=8, num_neighbors=2)) as seat:
            pictures = await seat.run(
                plans,
                inputs,
                on_step=on_step,
                preview_every=preview_every,
                call=call or Call(time_remaining_s=lambda: TIMEOUT_S),
            )
            return pictures, seat.info

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until a change of the endpoints makes `condition` true."""
        started = asyncio.get_running_loop().time()
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()
        return asyncio.get_running_loop().time() - started

    @property
    def in_use(self) -> set[str]:
        """The addresses that may be chosen."""
        return {endpoint.address for endpoint in self.stage.endpoints.in_use}

    def figure(self, name: str, **labels: str) -> float:
        """A metric; 0 where it was never set."""
        return self.registry.get_sample_value(name, {"model": self.stage.spec.name, **labels}) or 0.0


@asynccontextmanager
async def asked(
    size: int,
    *addresses: str,
    policy: EndpointPolicy | None = None,
    credentials: Credentials = lambda: None,
    wait_for: int = 1,
) -> AsyncIterator[Asked]:
    """A stage that is open; `wait_for` endpoints are in use."""
    asking = Asked(size, addresses, policy or EndpointPolicy(), credentials)
    try:
        await asking.stage.open(timeout_s=OPEN_S if wait_for else 0.0)
        await asking.until(lambda: len(asking.in_use) >= wait_for, OPEN_S)
        yield asking
    finally:
        await asking.stage.close()
