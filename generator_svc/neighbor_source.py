"""Where the pairs of an order come from: the caller, retrieval, or the record that is drawn again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from common.service.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from generator_svc.call import Call
from generator_svc.neighbors import Neighbor, Retrieved, take_references
from generator_svc.order import CheckedOrder, Order
from generator_svc.recorded import Recorded, RecordedNeighbor
from generator_svc.recorded_order import same_neighbor

WithoutRetrieval = Literal["fail", "draw"]
"""What is done when retrieval is asked and does not answer."""


class Retriever(Protocol):
    """Asks the retrieval service."""

    async def retrieve(self, order: Order, k: int, *, timeout_s: float) -> Retrieved:
        """The k best pairs for the order's prompt."""
        ...

    async def get_pair(self, knowledge_base: str, pair_id: str, *, timeout_s: float) -> Neighbor:
        """One pair, by its id."""
        ...


class NeighborSource:
    """Finds the pairs of orders."""

    def __init__(
        self,
        retriever: Retriever,
        *,
        timeout_s: float,
        without_retrieval: WithoutRetrieval,
        fault: Callable[[], str] = lambda: "",
    ) -> None:
        """
        Args:
            retriever: whom to ask.
            timeout_s: what retrieval gets to answer, where the caller's deadline leaves as much.
            without_retrieval: what is done when it does not.
            fault: why it cannot be asked, as far as is known: orders that are drawn without it do not wait for an answer
                that will not come.
        """
        self._retriever = retriever
        self._timeout_s = timeout_s
        self._without_retrieval = without_retrieval
        self._fault = fault

    async def find(self, checked: CheckedOrder, call: Call) -> Retrieved:
        """The pairs that shape the order's pictures: references, then what is retrieved.

        Raises:
            InvalidArgument: a reference is no picture that can be drawn.
            FailedPrecondition: a pair of the record is gone (NEIGHBOR_GONE) or another one now (NEIGHBOR_CHANGED).
            ServiceError: retrieval refuses, or fails and the service is set to fail then.
        """
        references: Sequence[Neighbor] = ()
        if checked.order.references:
            references = await asyncio.to_thread(take_references, checked.order.references)
        if checked.recorded is not None:
            return await self._read_again(checked.recorded, references, call)
        if not checked.k:
            return Retrieved().after(references)
        if self._without_retrieval == "draw" and (fault := self._fault()):
            return Retrieved(degraded_reason=fault).after(references)
        try:
            timeout_s = self._time_left_s(call)
            retrieved = await self._retriever.retrieve(checked.order, checked.k, timeout_s=timeout_s)
        except (Unavailable, DeadlineExceeded) as error:
            remaining_s = call.time_remaining_s()
            if self._without_retrieval == "fail" or (remaining_s is not None and remaining_s <= 0):
                raise
            retrieved = Retrieved(degraded_reason=error.description)
        return retrieved.after(references)

    async def _read_again(self, recorded: Recorded, references: Sequence[Neighbor], call: Call) -> Retrieved:
        knowledge_base = recorded.retrieval["knowledge_base"]
        kept = [neighbor for neighbor in recorded.neighbors if not neighbor.is_reference]
        stored = await asyncio.gather(*(self._pair(knowledge_base, neighbor, call) for neighbor in kept))
        return Retrieved(
            neighbors=(*references, *stored),
            knowledge_base=knowledge_base,
            index_fingerprint=recorded.retrieval["index_fingerprint"],
            shortfall_reason=recorded.retrieval["shortfall_reason"],
            method=recorded.retrieval["method"],
            degraded_reason=recorded.retrieval["degraded_reason"],
        )

    async def _pair(self, knowledge_base: str, neighbor: RecordedNeighbor, call: Call) -> Neighbor:
        try:
            stored = await self._retriever.get_pair(knowledge_base, neighbor.pair_id, timeout_s=self._time_left_s(call))
        except NotFound as error:
            raise FailedPrecondition(
                f"record_json: pair {neighbor.pair_id!r} is gone ({error.description})", reason="NEIGHBOR_GONE"
            ) from None
        except InvalidArgument as error:
            raise InvalidArgument("record_json", f"pair {neighbor.pair_id!r}: {error.description}") from None
        return same_neighbor(neighbor, stored)

    def _time_left_s(self, call: Call) -> float:
        remaining_s = call.time_remaining_s()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceeded("the caller's deadline has passed")
        return self._timeout_s if remaining_s is None else min(remaining_s, self._timeout_s)
