"""Neighbors asked of the retrieval service by BatchRetrieve: the only file of KNN-ImageText that knows protobuf."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from reimagen.retrieval.v1 import retrieval_pb2 as pb
from reimagen.retrieval.v1 import retrieval_pb2_grpc as pb_grpc

from client.channel import Tls, bearer, open_channel
from common.prompt import MAX_PROMPT_CHARACTERS

METHODS = ("bm25", "clip", "hybrid")
MAX_ASKED = 64  # retrieval.proto: k of one lookup
STREAM_PAIRS = 512  # lookups of one call
STREAM_DEADLINE_S = 60.0
PATIENCE_S = 120.0  # how long a service that is away is waited for
FIRST_PATIENCE_S = 10.0  # before it has ever answered: the address may be wrong
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 10.0
_PASSING = {
    code.value[0]
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
    )
}
_REFUSED = grpc.StatusCode.INVALID_ARGUMENT.value[0]

log = logging.getLogger(__name__)


class LookupFailed(Exception):
    """The service cannot be reached, cannot answer this kind of question, or changed while it was asked."""


class _Passing(Exception):
    """What may be gone when it is tried again."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """Where the retrieval service is: its address, an API key where it asks for one, and whom to trust."""

    address: str
    api_key: str = ""
    tls: Tls | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A pair whose neighbors are asked for; `content` is the sha256 of its picture, hexadecimal."""

    pair_id: str
    caption: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found for one pair.

    Attributes:
        neighbors: (pair id, score), best first; neither the pair itself nor one with the very same picture.
        refused: the field at fault and why, where the caption is no question (it names nothing to look up).
    """

    neighbors: tuple[tuple[str, float], ...] = ()
    refused: str = ""


class Lookup:
    """Asks one knowledge base in one way.

    Attributes:
        index: fingerprint of the index that answered last; equal fingerprints give equal answers.
    """

    def __init__(self, service: Service, *, knowledge_base: str, method: str, count: int) -> None:
        """Connects at the first question.

        Args:
            knowledge_base: empty where the service holds one only.
            method: one of METHODS.
            count: neighbors of each pair, 1 to MAX_ASKED.
        """
        self._channel = open_channel(service.address, service.tls)
        self._stub = pb_grpc.RetrievalServiceStub(self._channel)
        self._service = service
        self._asked = {"knowledge_base": knowledge_base, "method": pb.Method.Value(f"METHOD_{method.upper()}")}
        self._count = count
        self._answered = False
        self.index = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def index_now(self) -> str:
        """Fingerprint of the index that answers now; see `ask`."""
        self.ask([Question(pair_id="-", caption="picture", content="")])
        return self.index

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer for each, in their order. A service that is away is asked again for PATIENCE_S.

        Raises:
            LookupFailed: it stays away, or refuses; or its index changed since the first answer of this object.
        """
        answers: list[Answer] = []
        for first in range(0, len(questions), STREAM_PAIRS):
            answers += self._patiently(questions[first : first + STREAM_PAIRS])
        return answers

    def _patiently(self, questions: Sequence[Question]) -> list[Answer]:
        started, delay = time.monotonic(), _FIRST_DELAY_S
        while True:
            try:
                return self._stream(questions)
            except _Passing as error:
                patience = PATIENCE_S if self._answered else FIRST_PATIENCE_S
                if time.monotonic() - started + delay > patience:
                    raise LookupFailed(f"retrieval: {self._service.address} does not answer: {error}") from None
                log.warning("retrieval is asked again in %.1f s: %s", delay, error)
                time.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY_S)

    def _stream(self, questions: Sequence[Question]) -> list[Answer]:
        answers: list[Answer] = []
        call: Any = self._stub.BatchRetrieve(
            (self._request(number, question) for number, question in enumerate(questions)),
            timeout=STREAM_DEADLINE_S,
            metadata=bearer(self._service.api_key),
        )
        try:
            for reply in call:
                if len(answers) == len(questions) or reply.request_id != str(len(answers)):
                    raise LookupFailed(f"retrieval: answer {reply.request_id!r} where {len(answers)} was awaited")
                answers.append(self._answer(questions[len(answers)], reply))
        except grpc.RpcError as error:
            said: Any = error
            if said.code().value[0] in _PASSING:
                raise _Passing(f"{said.code().name}: {said.details()}") from None
            raise LookupFailed(f"retrieval: {said.code().name}: {said.details()}") from None
        finally:
            call.cancel()
        if len(answers) < len(questions):
            raise _Passing(f"the stream ended after {len(answers)} of {len(questions)} answers")
        return answers

    def _request(self, number: int, question: Question) -> pb.BatchRetrieveRequest:
        return pb.BatchRetrieveRequest(
            request_id=str(number),
            request=pb.RetrieveRequest(
                prompt=question.caption[:MAX_PROMPT_CHARACTERS],
                k=self._count,
                excluded_pair_ids=[question.pair_id],
                omit_images=True,
                **self._asked,
            ),
        )

    def _answer(self, question: Question, reply: pb.BatchRetrieveResponse) -> Answer:
        if reply.HasField("error"):
            return self._refused(question, reply.error)
        response = reply.response
        for leg in response.failed_legs:
            # The other leg answered alone: such neighbors would not be those of the method.
            raise _Passing(f"{pb.Method.Name(leg.leg)} failed: {leg.reason}")
        if self.index and response.index_fingerprint != self.index:
            raise LookupFailed(
                f"retrieval: knowledge base {response.knowledge_base!r} changed while it was asked (index"
                f" {self.index[:12]}…, then {response.index_fingerprint[:12]}…): run it again once nobody changes it"
            )
        self.index, self._answered = response.index_fingerprint, True
        return Answer(
            neighbors=tuple(
                (n.pair_id, n.score)
                for n in response.neighbors
                if n.pair_id != question.pair_id and (n.image_sha256 or None) != question.content
            )
        )

    def _refused(self, question: Question, error: pb.RetrieveError) -> Answer:
        if error.code in _PASSING:
            raise _Passing(error.message)
        if error.code == _REFUSED and error.field == "prompt":
            return Answer(refused=error.message)
        raise LookupFailed(f"retrieval: asked for pair {question.pair_id!r}: {error.message}")
