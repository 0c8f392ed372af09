"""Requests as anybody may send them: right, wrong, to nobody, and no messages at all. Always the same ones."""

from __future__ import annotations

import asyncio
import random
import string
from collections import Counter
from collections.abc import Iterator, Sequence

import grpc
import grpc.aio
from reimagen.generator.v1 import generator_pb2 as generator_pb
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as retrieval_pb

Request = tuple[str, bytes]

AT_ONCE = 32
TIMEOUT_S = 60.0


def retrieval_requests(num: int, seed: int = 1) -> Iterator[Request]:
    """Lookups of any prompt, method, k and knowledge base, pairs that are and are not there, and what nobody understands."""
    draw = random.Random(seed)
    service, bases = "/reimagen.retrieval.v1.RetrievalService", "/reimagen.retrieval.v1.KnowledgeBaseService"
    for _ in range(num):
        base = draw.choice(("", "demo", word(draw)))
        lookup = retrieval_pb.RetrieveRequest(
            prompt=" ".join(word(draw) for _ in range(draw.randrange(6))),
            k=draw.randrange(0, 60),
            knowledge_base=base,
            method=draw.randrange(0, 7),  # type: ignore[arg-type]
        )
        yield draw.choice(
            (
                (f"{service}/Retrieve", lookup.SerializeToString()),
                (f"{service}/Retrieve", lookup.SerializeToString()),
                (f"{bases}/GetPair", kb_pb.GetPairRequest(knowledge_base=base, pair_id=word(draw)).SerializeToString()),
                (f"{bases}/GetKnowledgeBaseStats", draw.randbytes(draw.randrange(20))),
                *unknown(draw, service),
            )
        )


def generator_requests(num: int, seed: int = 2) -> Iterator[Request]:
    """Orders that cannot be: numbers out of their range, nobody's styles, and what nobody understands. Nothing is drawn."""
    draw = random.Random(seed)
    service = "/reimagen.generator.v1.GeneratorService"
    for _ in range(num):
        order = generator_pb.GenerateRequest(
            prompt=word(draw),
            knowledge_base=word(draw),
            priority=draw.randrange(0, 9),
            num_pictures=draw.randrange(100, 999),
        )
        whole = generator_pb.GenerateImagesRequest(request=order)
        yield draw.choice(
            (
                (f"{service}/Generate", order.SerializeToString()),
                (f"{service}/GenerateImages", whole.SerializeToString()),
                (f"{service}/Generate", draw.randbytes(draw.randrange(1, 40))),
                *unknown(draw, service),
            )
        )


def unknown(draw: random.Random, service: str) -> Sequence[Request]:
    """To methods and services that there are not."""
    return ((f"{service}/{word(draw)}", b""), (f"/{word(draw)}/{word(draw)}", b"x"))


def word(draw: random.Random) -> str:
    """Letters."""
    return "".join(draw.choices(string.ascii_letters, k=draw.randrange(1, 12)))


async def send(address: str, requests: Iterator[Request]) -> Counter[str]:
    """Send them, some at once; gives how many ended with which status."""
    ended: Counter[str] = Counter()

    async def some(channel: grpc.aio.Channel) -> None:
        for method, message in requests:  # all workers take from one iterator
            try:
                if method.endswith("/Generate"):
                    async for _ in channel.unary_stream(method)(message, timeout=TIMEOUT_S):
                        pass
                else:
                    await channel.unary_unary(method)(message, timeout=TIMEOUT_S)
                ended["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ended[error.code().name] += 1

    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.gather(*(some(channel) for _ in range(AT_ONCE)))
    return ended
