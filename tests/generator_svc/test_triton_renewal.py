"""Renewed files of TLS while a Triton is asked: what is under way ends where it began, and nothing is cut off or kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry
from tritonclient.grpc import service_pb2
from tritonclient.grpc import service_pb2_grpc as services

from generator_svc import triton_client, triton_endpoints
from generator_svc.channel_tls import ChannelTls
from generator_svc.triton_client import TritonClient
from generator_svc.triton_endpoint import Endpoint, EndpointPolicy
from generator_svc.triton_endpoints import Endpoints
from generator_svc.triton_metrics import TritonMetrics
from tests.generator_svc.tiny_stack import Host

messages: Any = service_pb2  # made by protoc at its import
MODEL = "unet_64"
POLICY = EndpointPolicy(
    resolve_interval_s=0.05, answer_s=0.2, canary_interval_s=60.0, min_backoff_s=0.05, max_backoff_s=0.1
)
WAIT_S = 10.0
CLOSE_S = 0.2


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_client, "CLOSE_S", CLOSE_S)


class Scripted(services.GRPCInferenceServiceServicer):
    """Says what a Triton says, `answer_s` after it was asked.

    Attributes:
        begun: calls of its model that have come.
        cut: those of them that were cancelled. A real Triton may end by one.
    """

    def __init__(self) -> None:
        self.answer_s = 0.0
        self.begun = 0
        self.cut = 0

    async def ServerLive(self, request: object, context: object) -> object:
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: object, context: object) -> object:
        return messages.ServerReadyResponse(ready=True)

    async def ModelInfer(self, request: object, context: object) -> object:
        return await self._answer()

    async def ModelStreamInfer(self, requests: AsyncIterator[object], context: object) -> AsyncIterator[object]:
        async for _ in requests:
            yield messages.ModelStreamInferResponse(infer_response=await self._answer())

    async def _answer(self) -> Any:
        self.begun += 1
        try:
            await asyncio.sleep(self.answer_s)
        except asyncio.CancelledError:
            self.cut += 1
            raise
        answer = messages.ModelInferResponse(model_name=MODEL)
        answer.parameters["triton_final_response"].bool_param = True
        return answer


class Place:
    """A Triton that wants certificates of `authority`, the files of its caller, and the caller."""

    def __init__(self, folder: Path, authority: trustme.CA, triton: Scripted, port: int) -> None:
        self.authority = authority
        self.triton = triton
        self.address = f"localhost:{port}"
        self._files = {name: folder / name for name in ("ca", "certificate", "key")}
        self.renew()
        self.endpoints = Endpoints[bool](
            MODEL,
            [self.address],
            canary=canary,
            policy=POLICY,
            metrics=TritonMetrics(CollectorRegistry()),
            credentials=ChannelTls("triton", **self._files).credentials,
        )

    def renew(self, authority: trustme.CA | None = None, *, trusted: tuple[trustme.CA, ...] = ()) -> None:
        """Files as they are after a renewal."""
        issued = (authority or self.authority).issue_cert("generator")
        self._files["ca"].write_bytes(b"".join(each.cert_pem.bytes() for each in trusted or (self.authority,)))
        self._files["certificate"].write_bytes(issued.cert_chain_pems[0].bytes())
        self._files["key"].write_bytes(issued.private_key_pem.bytes())

    @property
    def endpoint(self) -> Endpoint[bool]:
        """The one that is in use."""
        (endpoint,) = self.endpoints.in_use
        return endpoint

    async def renewed(self) -> None:
        """Until it is asked over another connection."""
        before = self.endpoint.client
        self.renew()
        await until(lambda: self.endpoint.client is not before)

    @property
    def to_close(self) -> int:
        """Connections that are still there and are asked no more."""
        return len(self.endpoints._retiring)  # pyright: ignore[reportPrivateUsage]


async def canary(client: TritonClient, timeout_s: float) -> bool:
    await client.infer(MODEL, {}, timeout_s=timeout_s)
    return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(folder: Path, *, name: str = "localhost") -> AsyncIterator[Place]:
    """Both ends, which are asked and ask."""
    authority = trustme.CA()
    shown = authority.issue_cert(name)
    pair = shown.private_key_pem.bytes(), shown.cert_chain_pems[0].bytes()
    server, triton = grpc.aio.server(), Scripted()
    services.add_GRPCInferenceServiceServicer_to_server(triton, server)
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    place = Place(folder, authority, triton, server.add_secure_port("127.0.0.1:0", credentials))
    await server.start()
    try:
        await place.endpoints.open(timeout_s=WAIT_S if name == "localhost" else 0.0)
        yield place
    finally:
        async with asyncio.timeout(WAIT_S):
            await place.endpoints.close()
        await server.stop(None)


async def texts(place: Place) -> None:
    """One answer."""
    async with place.endpoints.lease(deadline=time.monotonic() + WAIT_S) as endpoint:
        await endpoint.client.infer(MODEL, {}, timeout_s=WAIT_S)


async def stage(place: Place) -> int:
    """Answers in parts."""
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(place.endpoints.lease(deadline=time.monotonic() + WAIT_S))
        stream = endpoint.client.stream(MODEL, {}, timeout_s=WAIT_S, farewell={})
        return len([answer async for answer in await stack.enter_async_context(aclosing(stream))])


def test_what_is_under_way_ends_over_the_connection_that_it_began_on(host: Host, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as place:
            place.triton.answer_s = 0.6  # longer than a canary may take
            begun = place.triton.begun + 2
            asked = [asyncio.create_task(texts(place)), asyncio.create_task(stage(place))]
            await until(lambda: place.triton.begun == begun)
            await place.renewed()
            assert await asyncio.gather(*asked) == [None, 1]
            assert place.triton.cut == 0
            await until(lambda: not place.to_close)

    host.call(work())


def test_what_was_left_is_not_cut_off_by_a_renewal(host: Host, tmp_path: Path) -> None:
    """The model ends it after the step that it is at; its Triton serves others meanwhile."""

    async def work() -> None:
        async with opened(tmp_path) as place:
            place.triton.answer_s = POLICY.answer_s + CLOSE_S + 0.4
            begun = place.triton.begun + 1
            asked = asyncio.create_task(stage(place))
            await until(lambda: place.triton.begun == begun)
            asked.cancel()
            with suppress(asyncio.CancelledError):
                await asked
            await place.renewed()
            await until(lambda: not place.to_close)
            assert place.triton.cut == 0

    host.call(work())


def test_the_end_does_not_wait_for_what_was_left(host: Host, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as place:
            place.triton.answer_s = 3 * WAIT_S
            begun = place.triton.begun + 1
            asked = asyncio.create_task(stage(place))
            await until(lambda: place.triton.begun == begun)
            asked.cancel()
            await place.renewed()

    host.call(work())


def test_a_connection_that_was_refused_is_kept_by_nobody(host: Host, tmp_path: Path) -> None:
    """However often it is tried while a request takes its time."""

    async def work() -> None:
        async with opened(tmp_path) as place:
            place.triton.answer_s = 0.7
            begun = place.triton.begun + 1
            asked = asyncio.create_task(stage(place))
            await until(lambda: place.triton.begun == begun)
            place.renew(trustme.CA())
            await until(lambda: place.endpoint.refused is not None)
            await asyncio.sleep(6 * POLICY.resolve_interval_s)
            assert place.to_close == 0
            assert await asked == 1

    host.call(work())


def test_who_has_drawn_may_be_who_closes(host: Host, tmp_path: Path) -> None:
    """The end of a request is waited for, not that of the task that asked it."""

    async def work() -> None:
        async with opened(tmp_path) as place, place.endpoints.lease(deadline=None):
            await place.renewed()

    host.call(work())


def test_an_address_that_is_anothers_now_is_asked_by_that_name(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the address of a pod that has gone is given to a pod of another Service."""

    async def work() -> None:
        async with opened(tmp_path, name="triton-unet-256") as place:
            assert not place.endpoints.in_use
            number = place.address.replace("localhost", "127.0.0.1")

            async def resolved(address: str) -> dict[str, str]:
                return {number: "triton-unet-256"}

            monkeypatch.setattr(triton_endpoints, "resolved", resolved)
            await until(lambda: bool(place.endpoints.in_use))

    host.call(work())


def test_another_authority_comes_by_way_of_both(host: Host, tmp_path: Path) -> None:
    """`ca.crt` with the certificates of both, as the guide of a change of authority has it."""

    async def work() -> None:
        async with opened(tmp_path) as place:
            before = place.endpoint.client
            place.renew(trusted=(trustme.CA(), place.authority))
            await until(lambda: place.endpoint.client is not before)
            await texts(place)

    host.call(work())
