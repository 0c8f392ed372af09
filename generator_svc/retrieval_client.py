"""Asking the retrieval service: protobuf stays in here."""

from __future__ import annotations

import json

import grpc
import grpc.aio
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from client.errors import violations
from common.service.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)
from generator_svc.neighbors import Neighbor, Retrieved
from generator_svc.order import Order

MAX_RESPONSE_BYTES = 256 << 20  # 64 neighbors of 4 MiB
RETRY_AFTER_S = 1.0
_SERVICE = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_ALIKE: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


class RetrievalClient:
    """One channel to one retrieval service."""

    def __init__(self, address: str) -> None:
        """Made in the event loop that uses it; connects at the first call."""
        self.address = address
        self._channel = grpc.aio.insecure_channel(
            address,
            options=(
                ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
                ("grpc.service_config", json.dumps(_RETRIES)),
            ),
        )
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)

    async def retrieve(self, order: Order, k: int, *, timeout_s: float) -> Retrieved:
        """The k best pairs for the order's prompt.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition, ResourceExhausted, DataLoss: as retrieval says.
            DeadlineExceeded: it does not answer within `timeout_s`.
            Unavailable: it cannot be reached.
        """
        request = pb.RetrieveRequest(
            prompt=order.prompt,
            k=k,
            knowledge_base=order.knowledge_base,
            method=order.method or "METHOD_UNSPECIFIED",
            excluded_pair_ids=order.excluded_pair_ids,
            exclude_exact=order.exclude_exact,
        )
        try:
            response = await self._stub.Retrieve(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, timeout_s) from error
        return Retrieved(
            neighbors=tuple(_neighbor(neighbor) for neighbor in response.neighbors),
            knowledge_base=response.knowledge_base,
            index_fingerprint=response.index_fingerprint,
            shortfall_reason=response.shortfall_reason,
            method=pb.Method.Name(response.method),
        )

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def _explain(self, error: grpc.aio.AioRpcError, timeout_s: float) -> ServiceError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            named = violations(error)
            return (
                InvalidArgument(named[0].field, named[0].description) if named else InvalidArgument("prompt", details)
            )
        if code in _ALIKE:
            return _ALIKE[code](details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"did not answer within {timeout_s:.3g} s"
            return DeadlineExceeded(f"retrieval at {self.address} {reason}")
        return Unavailable(f"retrieval at {self.address}: {code.name}: {details}", retry_after_s=RETRY_AFTER_S)


def _neighbor(neighbor: pb.Neighbor) -> Neighbor:
    return Neighbor(
        pair_id=neighbor.pair_id,
        caption=neighbor.caption,
        entity=neighbor.entity,
        image=neighbor.image,
        image_format=neighbor.image_format,
        facets=dict(sorted(neighbor.facets.items())),
        author=neighbor.author,
        source=neighbor.source,
        license=neighbor.license,
        score=round(neighbor.score, 4),
        rank=neighbor.rank,
    )
