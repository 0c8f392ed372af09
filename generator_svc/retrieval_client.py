"""Asking the retrieval service: protobuf stays in here."""

from __future__ import annotations

import json

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc as kb_pb_grpc
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from client.errors import retry_after_s, violations
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
from common.service.tracing import trace_metadata
from generator_svc.neighbors import Neighbor, Retrieved
from generator_svc.order import Order

MAX_RESPONSE_BYTES = 256 << 20  # 64 neighbors of 4 MiB
RETRY_AFTER_S = 1.0
_SERVICES = (
    pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name,
    kb_pb.DESCRIPTOR.services_by_name["KnowledgeBaseService"].full_name,
)
_RETRIES = {
    "loadBalancingConfig": [{"round_robin": {}}],  # replicas behind one name are asked by turns
    "methodConfig": [
        {
            "name": [{"service": service} for service in _SERVICES],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
_ALIKE: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


class RetrievalClient:
    """One channel to one retrieval service."""

    def __init__(self, address: str, *, api_key: str = "", credentials: grpc.ChannelCredentials | None = None) -> None:
        """Made in the event loop that uses it; connects at the first call.

        Args:
            address: unix:/path or host:port.
            api_key: shown at every call; empty: none is.
            credentials: of TLS; None: the connection is in the clear.
        """
        self.address = address
        options = (
            ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
            ("grpc.service_config", json.dumps(_RETRIES)),
            # gRPC's own pauses grow to two minutes: one that comes back would be found out that late.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 3000),  # what one attempt may take, TLS included
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)
        self._knowledge_bases = kb_pb_grpc.KnowledgeBaseServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

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
            response = await self._stub.Retrieve(
                request, timeout=timeout_s, metadata=(*self._metadata, *trace_metadata())
            )
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, timeout_s) from error
        # A pair may be stored by its address alone, which is nothing that a network can look at.
        with_image = [neighbor for neighbor in response.neighbors if neighbor.image]
        return Retrieved(
            neighbors=tuple(_neighbor(each, score=each.score, rank=each.rank) for each in with_image),
            knowledge_base=response.knowledge_base,
            index_fingerprint=response.index_fingerprint,
            shortfall_reason=_shortfall(response, len(response.neighbors) - len(with_image)),
            method=pb.Method.Name(response.method),
            failed_legs=tuple(pb.Method.Name(failed.leg) for failed in response.failed_legs),
        )

    async def get_pair(self, knowledge_base: str, pair_id: str, *, timeout_s: float) -> Neighbor:
        """One pair of a knowledge base, by its id; its score is 0 and its rank too.

        Raises:
            NotFound: there is no such pair, or no such knowledge base.
            FailedPrecondition, ResourceExhausted, DataLoss, DeadlineExceeded, Unavailable: as with `retrieve`.
        """
        request = kb_pb.GetPairRequest(knowledge_base=knowledge_base, pair_id=pair_id, include_image=True)
        try:
            response = await self._knowledge_bases.GetPair(
                request, timeout=timeout_s, metadata=(*self._metadata, *trace_metadata())
            )
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, timeout_s) from error
        return _neighbor(response.pair, score=0.0, rank=0)

    async def check(self, *, timeout_s: float) -> None:
        """Returns where it says that it serves.

        Raises:
            DeadlineExceeded: it does not answer within `timeout_s`.
            ServiceError: it cannot be reached, or says that it does not serve.
        """
        request = health_pb2.HealthCheckRequest(service=_SERVICES[0])  # pyright: ignore[reportAttributeAccessIssue]
        try:
            answer = await self._health.Check(request, timeout=timeout_s)  # pyright: ignore[reportAttributeAccessIssue]
        except grpc.aio.AioRpcError as error:
            raise self._explain(error, timeout_s) from error
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unavailable(f"retrieval at {self.address} does not serve now", retry_after_s=RETRY_AFTER_S)

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
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(details, retry_after_s=retry_after_s(error))
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return FailedPrecondition(f"retrieval at {self.address} refuses this service's API key: {details}")
        if code in _ALIKE:
            return _ALIKE[code](details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"did not answer within {timeout_s:.3g} s"
            return DeadlineExceeded(f"retrieval at {self.address} {reason}")
        later_s = retry_after_s(error) or RETRY_AFTER_S
        return Unavailable(f"retrieval at {self.address}: {code.name}: {details}", retry_after_s=later_s)


def _shortfall(response: pb.RetrieveResponse, num_without_image: int) -> str:
    if not num_without_image:
        return response.shortfall_reason
    without = f"{num_without_image} of the pairs found are stored without a picture"
    return "; ".join(filter(None, (response.shortfall_reason, without)))


def _neighbor(pair: pb.Neighbor | kb_pb.StoredPair, *, score: float, rank: int) -> Neighbor:
    return Neighbor(
        pair_id=pair.pair_id,
        caption=pair.caption,
        entity=pair.entity,
        image=pair.image,
        image_format=pair.image_format,
        image_sha256=pair.image_sha256,
        facets=dict(sorted(pair.facets.items())),
        author=pair.author,
        source=pair.source,
        license=pair.license,
        score=round(score, 4),
        rank=rank,
    )
