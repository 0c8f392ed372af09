"""An import into a running service, over gRPC."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from reimagen.retrieval.v1 import knowledge_base_pb2, knowledge_base_pb2_grpc

from client.errors import retry_after_s, violations
from retrieval_svc.imports.records import Source
from retrieval_svc.imports.sinks import BatchRefused
from retrieval_svc.pairs import NewPair, Upserted
from retrieval_svc.wire import facet_message, new_pair_message, upserted_of

CALL_DEADLINE_S = 120.0
PATIENCE_S = 120.0  # how long a service that is away is waited for
FIRST_PATIENCE_S = 10.0  # before it has ever answered: the address may be wrong
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 10.0
_TOO_LARGE = ("REQUEST_TOO_LARGE", "larger than max", "bytes; at most")
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)

log = logging.getLogger(__name__)


class ServiceLost(Exception):
    """The service cannot be reached, or refuses what is asked of it; the message says what and why."""


class ServiceSink:
    """A knowledge base of a running service; made if it is not there."""

    max_pairs = 64
    max_bytes = 3_000_000  # gRPC takes 4 MiB unless it is told otherwise

    def __init__(
        self, channel: grpc.Channel, name: str, source: Source, *, api_key: str = "", patience_s: float = PATIENCE_S
    ) -> None:
        """Find or make the knowledge base.

        Raises:
            ServiceLost: the service does not answer, or refuses.
        """
        self._stub = knowledge_base_pb2_grpc.KnowledgeBaseServiceStub(channel)
        self._name = name
        self._patience_s = min(patience_s, FIRST_PATIENCE_S)
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        self.identity = self._find_or_create(source)
        self._patience_s = patience_s

    def upsert(self, pairs: Sequence[NewPair]) -> list[Upserted]:
        """See `Sink`. A service that is away or full is asked again for a while.

        Raises:
            BatchRefused: the request is too large, or something in it is malformed.
            ServiceLost: the service stays away, or refuses for another reason.
        """
        try:
            messages = [new_pair_message(pair) for pair in pairs]
        except (ValueError, TypeError) as error:  # protobuf: a text with half of a surrogate pair, a value out of range
            raise BatchRefused("pair", str(error)) from None
        request = knowledge_base_pb2.UpsertPairsRequest(knowledge_base=self._name, pairs=messages)
        results = self._call("storing pairs", self._stub.UpsertPairs, request).results
        if [result.pair_id for result in results] != [pair.pair_id for pair in pairs]:
            raise ServiceLost(f"storing pairs: {len(pairs)} were sent, {len(results)} other ones are answered for")
        return [upserted_of(result) for result in results]

    def finish(self) -> None:
        """The service makes stored pairs findable by itself, within a second."""

    def _find_or_create(self, source: Source) -> str:
        asked = knowledge_base_pb2.GetKnowledgeBaseStatsRequest(knowledge_base=self._name)
        found = self._call("opening", self._stub.GetKnowledgeBaseStats, asked, (grpc.StatusCode.NOT_FOUND,))
        if found is None:
            wanted = knowledge_base_pb2.CreateKnowledgeBaseRequest(
                name=self._name,
                facets=[facet_message(facet) for facet in source.facets],
                scene_phrases=source.scene_phrases,
            )
            # Another import may have been faster; then the next question finds what it made.
            self._call("making", self._stub.CreateKnowledgeBase, wanted, (grpc.StatusCode.ALREADY_EXISTS,))
            found = self._call("opening", self._stub.GetKnowledgeBaseStats, asked)
        return f"{found.knowledge_base.name} {found.knowledge_base.created_at}"

    def _call(
        self, attempted: str, method: Callable[..., Any], request: Any, fine: tuple[grpc.StatusCode, ...] = ()
    ) -> Any:
        """The answer, or None for a status in `fine`."""
        give_up, delay_s = time.monotonic() + self._patience_s, _FIRST_DELAY_S
        while True:
            try:
                return method(request, timeout=CALL_DEADLINE_S, metadata=self._metadata)
            except grpc.RpcError as error:
                code, said = error.code(), error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
                if code in fine:
                    return None
                if code == grpc.StatusCode.RESOURCE_EXHAUSTED and any(mark in said for mark in _TOO_LARGE):
                    raise BatchRefused("image", said) from None
                if code == grpc.StatusCode.INVALID_ARGUMENT and isinstance(
                    request, knowledge_base_pb2.UpsertPairsRequest
                ):
                    named = violations(error)
                    raise BatchRefused(named[0].field if named else "pair", said) from None
                if code not in _PASSING or time.monotonic() >= give_up:
                    raise ServiceLost(f"{attempted} of knowledge base {self._name!r}: {code.name}: {said}") from None
                wait_s = max(delay_s, retry_after_s(error) or 0.0)
                log.warning("%s: %s (%s); again in %.1f s", attempted, code.name, said, wait_s)
                time.sleep(min(wait_s, max(0.0, give_up - time.monotonic())))
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
