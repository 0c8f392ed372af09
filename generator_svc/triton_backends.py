"""All that a generator asks of Tritons, and whether it can be asked now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from common.stages import STAGES
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_endpoints import Credentials
from generator_svc.triton_metrics import TritonMetrics
from generator_svc.triton_stage import TritonStage, TritonTexts

log = logging.getLogger(__name__)


class TritonBackends:
    """The stages and the text encoder at the same Tritons; used as a context."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        text_encoder: str,
        policy: EndpointPolicy,
        metrics: TritonMetrics,
        on_usable: Callable[[bool], object],
        open_timeout_s: float,
        credentials: Credentials = lambda: None,
    ) -> None:
        """
        Args:
            addresses: host:port or unix:/path; a name that resolves to several addresses is several endpoints.
            text_encoder: the name that records bear.
            policy, metrics, credentials: see `Endpoints`.
            on_usable: told whether every model is served, at the start and whenever that changes.
            open_timeout_s: how long entering waits for each model to be served; it does not fail without.
        """
        self._on_usable = on_usable
        self._open_timeout_s = open_timeout_s
        self._was_usable: bool | None = None
        given = {"policy": policy, "metrics": metrics, "on_change": self._look, "credentials": credentials}
        self.texts = TritonTexts(text_encoder, addresses, **given)
        self.stages = {spec.size: TritonStage(spec, addresses, **given) for spec in STAGES}

    @property
    def missing(self) -> str:
        """Why no order can be carried out now; empty where one can."""
        asked = (self.texts, *self.stages.values())
        unserved = [each.endpoints.model for each in asked if not each.endpoints.in_use]
        if unserved:
            return f"no Triton serves {', '.join(unserved)}"
        for stage in self.stages.values():
            for endpoint in stage.endpoints.in_use:
                wanted = endpoint.told.unet.text_width if endpoint.told else 0
                if wanted not in (0, self.texts.width):
                    return (
                        f"{stage.spec.name} at {endpoint.address} reads text states {wanted} wide;"
                        f" the text encoder gives {self.texts.width}"
                    )
        return ""

    async def __aenter__(self) -> TritonBackends:
        await asyncio.gather(*(each.open(timeout_s=self._open_timeout_s) for each in self._all()))
        self._look()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await asyncio.gather(*(each.close() for each in self._all()))

    def _all(self) -> tuple[TritonTexts | TritonStage, ...]:
        return (self.texts, *self.stages.values())

    def _look(self) -> None:
        missing = self.missing
        if (not missing) != self._was_usable:
            self._was_usable = not missing
            log.log(logging.WARNING if missing else logging.INFO, "triton", extra={"missing": missing})
            self._on_usable(not missing)
