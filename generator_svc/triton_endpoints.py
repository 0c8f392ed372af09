"""The Tritons that serve one model: which of them is asked next, and which not until a canary has passed.

Triton's own readiness lies when a Python stub is gone, so an endpoint is judged by what its model answers: by the
requests' own answers while there are some, by a canary otherwise. An endpoint that fails is ejected, and asked again
by canaries alone, further and further apart (a circuit breaker that is closed by a real answer of the model).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Generic

import grpc

from common.service.errors import DeadlineExceeded, ServiceError, Unavailable
from generator_svc.triton_addresses import resolved
from generator_svc.triton_client import LEFT_S, TritonClient
from generator_svc.triton_endpoint import Canary, Endpoint, EndpointPolicy, T
from generator_svc.triton_errors import EndpointFailed
from generator_svc.triton_metrics import TritonMetrics

# Suspicion: a request's failure is 1, a failure that is certain all of it. Requests that are sent again fail many times in
# the time that one takes to succeed: where a third of the calls is lost, 8 in a row before the first success are no rarity.
_EJECTED_AT = 16
_OF_CANARY, _OF_SILENCE = 4, 8  # the same of a canary that failed, and of one that nobody answered
_RECHECK_S = 0.25  # between canaries while an endpoint is under suspicion

Credentials = Callable[[], grpc.ChannelCredentials | None]
"""Gives those of TLS, the same object while they are the same; None: connections are in the clear."""

log = logging.getLogger(__name__)


class Endpoints(Generic[T]):
    """The endpoints of one model; `open` before use, `close` after it, in one event loop."""

    def __init__(
        self,
        model: str,
        addresses: Sequence[str],
        *,
        canary: Canary[T],
        policy: EndpointPolicy,
        metrics: TritonMetrics,
        on_change: Callable[[], object] = lambda: None,
        credentials: Credentials = lambda: None,
        patience_s: Callable[[T], float] = lambda told: float("inf"),
    ) -> None:
        """
        Args:
            model: its name in Triton.
            addresses: host:port or unix:/path; a name that resolves to several addresses is several endpoints.
            canary: asks the model.
            policy: how they are watched.
            metrics: where it is counted.
            on_change: called whenever an endpoint is ejected or taken in.
            credentials: of TLS, asked for whenever names are looked up; where they are others, endpoints are connected anew,
                but for those in use that do not take them.
            patience_s: how long a model that says this of itself may go without an answer, see `stall_s`.
        """
        self.model = model
        self.policy = policy
        self._addresses = tuple(addresses)
        self._canary = canary
        self._metrics = metrics
        metrics.begin(model)
        self._on_change = on_change
        self._credentials = credentials
        self._patience_s = patience_s
        self._endpoints: dict[str, Endpoint[T]] = {}
        self._taken_in = asyncio.Event()
        self._resolving: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()
        self._random = random.Random()

    @property
    def in_use(self) -> list[Endpoint[T]]:
        """Those that may be chosen."""
        return [endpoint for endpoint in self._endpoints.values() if endpoint.is_in]

    async def open(self, *, timeout_s: float) -> None:
        """Begin to watch; returns when an endpoint is in use, or after `timeout_s`."""
        await self._resolve()
        self._resolving = asyncio.create_task(self._keep_resolving())
        with suppress(Unavailable):
            await self._choose(time.monotonic() + timeout_s, avoid=None)

    async def close(self) -> None:
        """End the watching and the connections."""
        if self._resolving:
            self._resolving.cancel()
            await asyncio.gather(self._resolving, return_exceptions=True)
        self._ending.set()
        for address in list(self._endpoints):
            self._retire(address)
        await asyncio.gather(*self._retiring)

    @asynccontextmanager
    async def lease(self, *, deadline: float | None, avoid: Endpoint[T] | None = None) -> AsyncIterator[Endpoint[T]]:
        """The endpoint with the least requests under way, for one request; the block's failure is its failure.

        Args:
            deadline: time.monotonic() until which an endpoint is waited for; None: for `patience_s`.
            avoid: is chosen only if no other is in use.

        Raises:
            DeadlineExceeded, Unavailable: no endpoint came into use in time.
            EndpointFailed: it was ejected while it worked on the request, and has to be taken for lost.
        """
        until = time.monotonic() + self.policy.patience_s if deadline is None else deadline
        try:
            endpoint = await self._choose(until, avoid)
        except Unavailable:
            if deadline is None:
                raise
            raise DeadlineExceeded(f"no Triton has served {self.model} within the time that was left") from None
        task = asyncio.current_task()
        assert task is not None
        gauge = self._metrics.in_flight.labels(self.model, endpoint.address)
        endpoint.in_flight += 1
        over = endpoint.requests[task] = asyncio.Event()
        gauge.set(endpoint.in_flight)
        try:
            yield endpoint
            self._praise(endpoint)
        except EndpointFailed as error:
            self._blame(endpoint, error, suspicion=_EJECTED_AT if error.is_down else 1)
            raise
        except asyncio.CancelledError:
            if task not in endpoint.abandoned:
                raise
            if task.uncancel() > 0:  # whoever waits has gone, too
                raise
            raise EndpointFailed(f"{self._at(endpoint)} does not answer", kind="hung", is_down=True) from None
        finally:
            endpoint.in_flight -= 1
            endpoint.requests.pop(task, None)
            over.set()
            endpoint.abandoned.discard(task)
            if self._endpoints.get(endpoint.address) is endpoint:
                gauge.set(endpoint.in_flight)

    async def _choose(self, until: float, avoid: Endpoint[T] | None) -> Endpoint[T]:
        while True:
            candidates = self.in_use
            if candidates:
                others = [each for each in candidates if each is not avoid] or candidates
                least = min(each.in_flight for each in others)
                return self._random.choice([each for each in others if each.in_flight == least])
            self._taken_in.clear()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + until - time.monotonic()):
                    await self._taken_in.wait()
            except TimeoutError:
                raise Unavailable(f"no Triton serves {self.model} now", reason="TRITON_UNAVAILABLE") from None

    def _praise(self, endpoint: Endpoint[T]) -> None:
        endpoint.suspicion = endpoint.ejections = 0
        endpoint.heard_at = time.monotonic()

    def _blame(self, endpoint: Endpoint[T], error: ServiceError, *, suspicion: int) -> None:
        endpoint.suspicion += suspicion
        is_news, endpoint.fault = endpoint.fault != error.description, error.description
        if not endpoint.is_in:
            if is_news:
                log.info("not taken in", extra={"endpoint": self._at(endpoint), "reason": error.description})
            return
        endpoint.doubted.set()
        if endpoint.suspicion >= _EJECTED_AT:
            endpoint.is_in = False
            endpoint.ejections += 1
            self._metrics.ejections.labels(self.model, endpoint.address).inc()
            self._metrics.canary_success.labels(self._target(endpoint)).set(0)
            log.warning("ejected", extra={"endpoint": self._at(endpoint), "reason": error.description})
            self._on_change()

    def _admit(self, endpoint: Endpoint[T], told: T) -> None:
        endpoint.told = told
        endpoint.suspicion = 0
        endpoint.heard_at = time.monotonic()
        self._metrics.canary_last_success.labels(self._target(endpoint)).set_to_current_time()
        if not endpoint.is_in:
            endpoint.is_in, endpoint.fault = True, ""
            self._metrics.canary_success.labels(self._target(endpoint)).set(1)
            log.info("taken in", extra={"endpoint": self._at(endpoint)})
            self._taken_in.set()
            self._on_change()

    async def _watch(self, endpoint: Endpoint[T]) -> None:
        while True:
            was_in = endpoint.is_in
            endpoint.doubted.clear()
            if was_in and not endpoint.suspicion:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s(endpoint)):
                        await endpoint.doubted.wait()
            else:
                await asyncio.sleep(self._pause_s(endpoint))
            if was_in and not endpoint.is_in:
                continue  # to pause first
            silence_s = time.monotonic() - endpoint.heard_at
            if not endpoint.is_in or endpoint.suspicion or silence_s >= self.policy.canary_interval_s:
                await self._probe(endpoint)

    def _pause_s(self, endpoint: Endpoint[T]) -> float:
        """Until the next canary."""
        policy = self.policy
        if endpoint.is_in:
            if endpoint.suspicion:
                return _RECHECK_S
            return max(_RECHECK_S, endpoint.heard_at + policy.canary_interval_s - time.monotonic())
        if not endpoint.ejections:  # it is new
            return 0.0
        backoff_s = min(policy.max_backoff_s, policy.min_backoff_s * 2 ** min(endpoint.ejections - 1, 16))
        return backoff_s * self._random.uniform(0.5, 1.0)

    async def _probe(self, endpoint: Endpoint[T]) -> None:
        started, timeout_s = time.monotonic(), self.policy.canary_timeout_s
        canary = asyncio.ensure_future(self._canary(endpoint.client, self.policy.answer_s))
        is_live = asyncio.create_task(endpoint.client.is_live(timeout_s))
        try:
            await asyncio.wait({canary}, timeout=timeout_s)
            if not canary.done() and not await is_live:
                raise TimeoutError
            async with asyncio.timeout(self.policy.answer_s):
                told = await canary
        except (TimeoutError, DeadlineExceeded):
            is_stalled = time.monotonic() - endpoint.heard_at >= self._stall_s(endpoint)
            if await is_live and not is_stalled:
                return
            error = EndpointFailed(f"{self._at(endpoint)} is silent", kind="hung", is_down=True)
            suspicion = _EJECTED_AT if is_stalled else _OF_SILENCE
        except EndpointFailed as failure:
            error, suspicion = failure, _EJECTED_AT if failure.is_down else _OF_CANARY
        except ServiceError as refusal:  # a full queue, for one: it lives
            log.debug("canary refused", extra={"endpoint": self._at(endpoint), "reason": refusal.description})
            return
        except Exception:
            log.exception("a canary could not be sent to %s", self._at(endpoint))
            error, suspicion = EndpointFailed("the canary is refused", kind="other", is_down=True), _EJECTED_AT
        else:
            self._metrics.canary_s.labels(self.model).observe(time.monotonic() - started)
            self._admit(endpoint, told)
            return
        finally:
            canary.add_done_callback(lambda over: over.cancelled() or over.exception())  # which nobody may have awaited
            canary.cancel()
            is_live.cancel()
        was_in = endpoint.is_in
        self._blame(endpoint, error, suspicion=suspicion)
        if not was_in:
            endpoint.ejections += 1  # the next canary comes later
        elif not endpoint.is_in:
            self._abandon(endpoint)

    def _stall_s(self, endpoint: Endpoint[T]) -> float:
        policy = self.policy
        if endpoint.speaking or endpoint.told is None:
            return min(policy.stall_s, policy.silence_s)
        return min(policy.stall_s, max(policy.silence_s, self._patience_s(endpoint.told)))

    def _abandon(self, endpoint: Endpoint[T]) -> None:
        """Take the requests at a silent endpoint for lost; `lease` says so to whoever waits for them."""
        for task in endpoint.requests:
            endpoint.abandoned.add(task)
            task.cancel()

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.sleep(self.policy.resolve_interval_s)
            try:
                await self._resolve()
            except Exception:
                log.exception("the addresses of %s could not be looked up", self.model)

    async def _resolve(self) -> None:
        found: dict[str, str] = {}
        for address in self._addresses:
            try:
                found |= await resolved(address)
            except OSError as error:  # no answer is no news: those that are known stay
                log.warning("no address", extra={"endpoint": address, "reason": str(error)})
                found |= {known: endpoint.client.name for known, endpoint in self._endpoints.items()}
        credentials = self._credentials()
        for address in found.keys() - self._endpoints.keys():
            client = TritonClient(address, name=found[address], credentials=credentials)
            endpoint = self._endpoints[address] = Endpoint[T](client=client)
            self._metrics.in_flight.labels(self.model, address).set(0)
            self._metrics.ejections.labels(self.model, address)
            self._metrics.canary_success.labels(self._target(endpoint)).set(0)
            self._metrics.canary_last_success.labels(self._target(endpoint))
            endpoint.watch = asyncio.create_task(self._watch(endpoint))
        for address in self._endpoints.keys() - found.keys():
            self._retire(address)
        wanted = {address: (name, credentials) for address, name in found.items()}
        stale = [
            each
            for each in self._endpoints.values()
            if (each.client.name, each.client.credentials) != wanted[each.address]
        ]
        await asyncio.gather(*(self._reconnect(endpoint, *wanted[endpoint.address]) for endpoint in stale))

    async def _reconnect(self, endpoint: Endpoint[T], name: str, credentials: grpc.ChannelCredentials | None) -> None:
        """From now on it is asked over a new connection; not where it is in use and refuses that one."""
        before = endpoint.client
        client = TritonClient(before.address, name=name, credentials=credentials)
        try:
            if endpoint.is_in:
                await client.check_ready(self.policy.canary_timeout_s)
            endpoint.client = client
        except ServiceError as error:
            if endpoint.refused is not credentials:
                log.error("connection kept", extra={"endpoint": self._at(endpoint), "reason": error.description})
            endpoint.refused = credentials
        finally:
            if endpoint.client is before:
                await client.close()
            else:
                # After what is under way, a canary among it, and what was left: its Triton serves on, and may end by a call
                # that is cancelled. At the end of all endpoints there is no time for that.
                canary = asyncio.wait_for(self._ending.wait(), self.policy.answer_s)
                self._close_after(before, canary, *_ends(endpoint), left_s=LEFT_S)

    def _retire(self, address: str) -> None:
        """Choose an endpoint no more; it is closed when its last request has ended."""
        endpoint = self._endpoints.pop(address)
        was_in, endpoint.is_in = endpoint.is_in, False
        self._metrics.forget(self.model, address)
        if was_in:
            self._on_change()
        assert endpoint.watch is not None
        endpoint.watch.cancel()
        self._close_after(endpoint.client, endpoint.watch, *_ends(endpoint))

    def _close_after(self, client: TritonClient, *users: Awaitable[object], left_s: float = 0.0) -> None:
        async def close() -> None:
            await asyncio.gather(*users, return_exceptions=True)
            either = [asyncio.create_task(each) for each in (client.rest(left_s), self._ending.wait())]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            for each in either:
                each.cancel()
            await client.close()

        closing = asyncio.create_task(close())
        self._retiring.add(closing)
        closing.add_done_callback(self._retiring.discard)

    def _at(self, endpoint: Endpoint[T]) -> str:
        return f"{self.model} at {endpoint.address}"

    def _target(self, endpoint: Endpoint[T]) -> str:
        return f"{self.model}@{endpoint.address}"


def _ends(endpoint: Endpoint[T]) -> list[Awaitable[object]]:
    """Of the requests under way: not of the tasks that have asked them, one of which may be what closes the connections."""
    return [over.wait() for over in endpoint.requests.values()]
