"""Stages and the text encoder in Triton, behind the protocols of `stage_backend.py`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

import numpy as np

from common.diffusion.plan import Plan
from common.service.errors import ResourceExhausted, Unavailable
from common.stages import StageSpec
from generator_svc.call import Call
from generator_svc.live_bytes import RETRY_AFTER_S as ROOM_RETRY_AFTER_S
from generator_svc.live_bytes import live_bytes
from generator_svc.stage_backend import OnStep, StageInfo, StageNeeds
from generator_svc.stage_inputs import EncodedTexts, StageInputs
from generator_svc.stage_tensors import (
    PATIENCE_PASSES,
    PATIENCE_S,
    TEXT_ENCODER,
    ModelCard,
    StageRequest,
    StageResponse,
    Tensors,
    pack_request,
    pack_texts,
    unpack_encoded,
    unpack_response,
)
from generator_svc.triton_client import TritonClient
from generator_svc.triton_endpoint import Endpoint, EndpointPolicy
from generator_svc.triton_endpoints import Credentials, Endpoints
from generator_svc.triton_errors import RETRY_AFTER_S, EndpointFailed
from generator_svc.triton_metrics import TritonMetrics
from generator_svc.triton_retries import RetryBudget, with_retries

_NO_PLANS = pack_request(StageRequest(plans=(), inputs=None))
"""Asks for the model's card; under the request id of a live request it ends that one."""


async def ask_card(model: str, client: TritonClient, timeout_s: float) -> ModelCard:
    """What a stage's model says of itself: its canary, which runs in the model's own process, between two steps."""
    async with aclosing(client.stream(model, _NO_PLANS, timeout_s=timeout_s)) as answers:
        async for tensors in answers:
            if (card := unpack_response(tensors).model) is not None:
                return card
    raise EndpointFailed(f"{model} at {client.address} does not say what it is", kind="other", is_down=False)


async def ask_width(client: TritonClient, timeout_s: float) -> int:
    """Width of the text encoder's states: its canary."""
    tensors = await client.infer(TEXT_ENCODER, pack_texts(["canary"]), timeout_s=timeout_s)
    return unpack_encoded(tensors).states.shape[2]


class TritonStage:
    """A stage that Tritons run."""

    def __init__(
        self,
        spec: StageSpec,
        addresses: Sequence[str],
        *,
        policy: EndpointPolicy,
        metrics: TritonMetrics,
        on_change: Callable[[], object] = lambda: None,
        credentials: Credentials = lambda: None,
    ) -> None:
        """`open` before use.

        Args:
            spec: the stage; its model in Triton bears its name.
            addresses: of Tritons, see `Endpoints`.
            policy, metrics, on_change, credentials: see `Endpoints`.
        """
        self.spec = spec

        async def canary(client: TritonClient, timeout_s: float) -> ModelCard:
            return await ask_card(spec.name, client, timeout_s)

        self.endpoints: Endpoints[ModelCard] = Endpoints(
            spec.name,
            addresses,
            canary=canary,
            policy=policy,
            metrics=metrics,
            on_change=on_change,
            credentials=credentials,
            patience_s=lambda card: max(PATIENCE_S, PATIENCE_PASSES * card.pass_s),
        )
        self.budget = RetryBudget()
        self.metrics = metrics
        self._taken_bytes = 0

    async def open(self, *, timeout_s: float) -> None:
        """Begin to watch the endpoints; returns when one is in use, or after `timeout_s`."""
        await self.endpoints.open(timeout_s=timeout_s)

    async def close(self) -> None:
        """End the connections."""
        await self.endpoints.close()

    async def info(self) -> StageInfo:
        """See `StageBackend.info`; of several versions, the newest."""
        cards = self._cards()
        return stage_info(_newest(cards), sorted(cards))

    @asynccontextmanager
    async def reserve(self, needs: StageNeeds) -> AsyncIterator[TritonSeat]:
        """See `StageBackend.reserve`.

        The models bound what they keep, too, for all generators together; here it is refused before any work is done.
        """
        cards = self._cards()
        newest = _newest(cards)
        needed = live_bytes(
            newest.unet,
            self.spec.size,
            num_pictures=needs.num_pictures,
            num_tokens=needs.num_tokens,
            num_neighbors=needs.num_neighbors,
            element_bytes=newest.element_bytes,
        )
        limit = sum(card.max_live_bytes for card in cards.values())
        if self._taken_bytes + needed > limit:
            raise ResourceExhausted(
                f"stage {self.spec.size}: {needs.num_pictures} pictures need {needed >> 20} MiB beside the"
                f" {self._taken_bytes >> 20} MiB of others; the limit is {limit >> 20} MiB",
                retry_after_s=ROOM_RETRY_AFTER_S if self._taken_bytes else None,
            )
        self._taken_bytes += needed
        try:
            yield TritonSeat(self, stage_info(newest, sorted(cards)))
        finally:
            self._taken_bytes -= needed

    def _cards(self) -> dict[str, ModelCard]:
        """What is served now, by address; not empty."""
        cards = {each.address: each.told for each in self.endpoints.in_use if each.told is not None}
        if not cards:
            raise Unavailable(
                f"no Triton serves {self.spec.name} now", retry_after_s=RETRY_AFTER_S, reason="TRITON_UNAVAILABLE"
            )
        return cards


class TritonSeat:
    """Room for an order's pictures.

    Attributes:
        info: the version that served when the seat was taken; once `run` has ended, the one that has drawn.
    """

    def __init__(self, stage: TritonStage, info: StageInfo) -> None:
        self.info = info
        self._stage = stage

    async def run(
        self, plans: Sequence[Plan], inputs: StageInputs, *, on_step: OnStep, preview_every: int, call: Call
    ) -> np.ndarray:
        """See `StageSeat.run`. Steps that are done again at another endpoint are not told again."""
        tensors = pack_request(StageRequest(plans=tuple(plans), inputs=inputs, preview_every=preview_every))
        steps = _Steps(on_step)

        async def attempt(endpoint: Endpoint[ModelCard], timeout_s: float | None) -> np.ndarray:
            drawn = await self._draw(endpoint, tensors, steps, timeout_s)
            assert drawn.pictures is not None and drawn.model is not None
            endpoint.told = drawn.model  # one that is busy is asked for no card: its version may be a new one
            self.info = stage_info(drawn.model, self.info.endpoints)
            return drawn.pictures

        stage = self._stage
        return await with_retries(stage.endpoints, attempt, budget=stage.budget, metrics=stage.metrics, call=call)

    async def _draw(
        self, endpoint: Endpoint[ModelCard], tensors: Tensors, steps: _Steps, timeout_s: float | None
    ) -> StageResponse:
        """The last response of one endpoint."""
        model, metrics = self._stage.spec.name, self._stage.metrics
        sent = time.monotonic()
        began = None
        stream = endpoint.client.stream(model, tensors, timeout_s=timeout_s, farewell=_NO_PLANS)
        async with aclosing(stream) as answers, endpoint.listening() as heard:
            async for answer in answers:
                heard()
                now = time.monotonic()
                if began is None:
                    began = now
                    metrics.queue_s.labels(model).observe(now - sent)
                response = unpack_response(answer)
                steps.tell(response)
                if response.pictures is not None:
                    metrics.run_s.labels(model).observe(now - began)
                    return response
        raise EndpointFailed(f"{model} at {endpoint.address} ended without a picture", kind="other", is_down=False)


class TritonTexts:
    """The text encoder, run by Tritons."""

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        *,
        policy: EndpointPolicy,
        metrics: TritonMetrics,
        on_change: Callable[[], object] = lambda: None,
        credentials: Credentials = lambda: None,
    ) -> None:
        """`name` is the one that records bear; the rest as in `TritonStage`."""
        self.name = name
        self.endpoints: Endpoints[int] = Endpoints(
            TEXT_ENCODER,
            addresses,
            canary=ask_width,
            policy=policy,
            metrics=metrics,
            on_change=on_change,
            credentials=credentials,
        )
        self._budget = RetryBudget()
        self._metrics = metrics

    @property
    def width(self) -> int:
        """Of a token's state; 0 while no Triton serves the encoder."""
        return next((each.told for each in self.endpoints.in_use if each.told is not None), 0)

    async def open(self, *, timeout_s: float) -> None:
        """Begin to watch the endpoints; returns when one is in use, or after `timeout_s`."""
        await self.endpoints.open(timeout_s=timeout_s)

    async def close(self) -> None:
        """End the connections."""
        await self.endpoints.close()

    async def encode(self, texts: Sequence[str], *, call: Call) -> EncodedTexts:
        """See `TextBackend.encode`."""
        tensors = pack_texts(texts)

        async def attempt(endpoint: Endpoint[int], timeout_s: float | None) -> EncodedTexts:
            return unpack_encoded(await endpoint.client.infer(TEXT_ENCODER, tensors, timeout_s=timeout_s))

        return await with_retries(self.endpoints, attempt, budget=self._budget, metrics=self._metrics, call=call)


class _Steps:
    """Tells each step of each picture once, in order, whatever endpoint does it."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self._told: Counter[int] = Counter()

    def tell(self, response: StageResponse) -> None:
        for picture, done in enumerate(response.steps):
            for step in range(self._told[picture] + 1, done + 1):
                self._told[picture] = step
                self._on_step(picture, step, response.previews.get(picture) if step == done else None)


def stage_info(card: ModelCard, endpoints: Sequence[str]) -> StageInfo:
    """What the model's card says, for the pipeline."""
    return StageInfo(
        stage=card.stage,
        unet=card.unet,
        version=card.version,
        weights_sha256=card.sha256,
        parameters=card.parameters,
        trained=card.trained,
        endpoints=tuple(endpoints),
    )


def _newest(cards: Mapping[str, ModelCard]) -> ModelCard:
    return max(cards.values(), key=lambda card: _number(card.version))


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1
