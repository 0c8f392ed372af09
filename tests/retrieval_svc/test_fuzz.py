"""Any message that the contract can say, over a real socket: answered, or refused as the caller's fault; never a fault of ours.

REIMAGEN_FUZZ sets how many messages each method is sent (80 if it is not set).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from tests.retrieval_svc.serving import TIMEOUT_S, Client, caught_up, fill, hosted, picture, spawned, vector

NUM_MESSAGES = int(os.environ.get("REIMAGEN_FUZZ", "80"))
OURS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
PLAIN = ("small", "cat", "guide dog, noto style", "style", "noto", "noto--cat")
ODD = ("", " ", "\x00", "\u202e", "🦮" * 40, "a=b", "x" * 3000)
TEXTS = st.sampled_from(PLAIN + ODD) | st.text(max_size=30)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'/>"
PICTURES = (b"", picture(1), picture(1)[:40], SVG, SVG[:20], b"GIF89a", b"\xff\xd8\xff")
FLOATS = st.sampled_from((0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), 1e38, 1e-45))
INTEGERS = {
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: st.integers(0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 6),
}
SMALL = st.integers(0, 70)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Of one field, not repeated."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(field.message_type)
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.sampled_from(PICTURES) | st.binary(max_size=40)
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return FLOATS | st.floats(width=32)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_ENUM:
        return INTEGERS[field.type]
    return SMALL | INTEGERS[field.type]


def repeated(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Of a repeated field; embeddings of the right size, too."""
    several = st.lists(values(field), max_size=4)
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return several | st.integers(0, 9).map(vector) | st.lists(FLOATS, min_size=8, max_size=8)
    return several


@cache
def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Every message of this type, each field set or not."""
    kind = GetMessageClass(descriptor)
    entries = {}
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
            entries[field.name] = st.dictionaries(values(key), values(value), max_size=3)
        else:
            entries[field.name] = repeated(field) if field.is_repeated else values(field)
    return st.fixed_dictionaries({}, optional=entries).map(lambda given: _made(kind, given))


def _made(kind: Any, given: dict[str, Any]) -> Message:
    by_oneof: dict[str, str] = {}
    for name in given:  # of a oneof the last one
        oneof = kind.DESCRIPTOR.fields_by_name[name].containing_oneof
        if oneof is not None:
            by_oneof[oneof.name] = name
    left_out = {
        name
        for name in given
        if (oneof := kind.DESCRIPTOR.fields_by_name[name].containing_oneof) is not None and by_oneof[oneof.name] != name
    }
    return kind(**{name: value for name, value in given.items() if name not in left_out})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with hosted(tmp_path_factory.mktemp("fuzz"), snapshots=tmp_path_factory.mktemp("snapshots")) as hosting:
        fill(hosting)
        caught_up(hosting)
        yield hosting


def answer(call: Any, request: Any) -> grpc.StatusCode:
    """The status of a call, which must not be one of ours."""
    code, said = grpc.StatusCode.OK, ""
    try:
        call(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        refused: Any = error
        code, said = refused.code(), refused.details()
    assert code not in OURS, f"{code.name}: {said} for {request!r}"
    return code


def fuzzed(kind: Any) -> Any:
    """A test over messages of this kind; always the same ones, for a red build must be red again."""
    checks = settings(
        max_examples=NUM_MESSAGES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: checks(given(request=messages(kind.DESCRIPTOR))(test))


seen: set[grpc.StatusCode] = set()


@fuzzed(pb.RetrieveRequest)
def test_any_lookup(client: Client, request: pb.RetrieveRequest) -> None:
    seen.add(answer(client.retrieval.Retrieve, request))
    request.knowledge_base = "small"  # and so that it gets further
    seen.add(answer(client.retrieval.Retrieve, request))


@fuzzed(kb_pb.UpsertPairsRequest)
def test_any_upsert(client: Client, request: kb_pb.UpsertPairsRequest) -> None:
    request.knowledge_base = "small"
    seen.add(answer(client.bases.UpsertPairs, request))


@pytest.mark.parametrize(
    "name",
    ["CreateKnowledgeBase", "DeletePairs", "GetPair", "ListPairs", "ListKnowledgeBases", "GetKnowledgeBaseStats"],
)
def test_any_other_request(client: Client, name: str) -> None:
    kind = getattr(kb_pb, f"{name}Request")

    @fuzzed(kind)
    def ask(request: Message) -> None:
        answer(getattr(client.bases, name), request)

    ask()


def test_it_has_lived_through_all_of_that(client: Client) -> None:
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= seen, "the messages reach what they are to reach"
    fill(client, "afterwards")
    caught_up(client, "afterwards")
    assert client.retrieve("guide dog", knowledge_base="afterwards").neighbors


@settings(
    max_examples=NUM_MESSAGES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(raw=st.binary(max_size=60) | messages(pb.RetrieveRequest.DESCRIPTOR).map(lambda m: m.SerializeToString()[:-1]))
def test_any_bytes(client: Client, raw: bytes) -> None:
    for method in ("RetrievalService/Retrieve", "KnowledgeBaseService/UpsertPairs"):
        answer(client.channel.unary_unary(f"/reimagen.retrieval.v1.{method}"), raw)


def test_frames_that_lie_about_their_length_end_their_connection_only(tmp_path: Path) -> None:
    """A message that claims 2 GiB, half a message, and none of HTTP/2: the process answers others, and does not grow."""
    with spawned(tmp_path, address="127.0.0.1:0") as client:
        fill(client)
        host, _, port = client.address.rpartition(":")
        for said in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 9, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b""):
            with socket.create_connection((host, int(port)), timeout=5) as raw:
                raw.sendall(said)
        before = _rss(client)
        big = b"\x0a\xff\xff\xff\xff\x07" + b"x" * 1000  # a field of 2 GiB of which a thousand bytes come
        with pytest.raises(grpc.RpcError) as caught:
            client.channel.unary_unary("/reimagen.retrieval.v1.RetrievalService/Retrieve")(big, timeout=TIMEOUT_S)
        refused: Any = caught.value
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        caught_up(client)
        assert client.retrieve("cat").neighbors
        assert _rss(client) - before < 100 << 20


def _rss(client: Client) -> int:
    status = Path(f"/proc/{client.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10
