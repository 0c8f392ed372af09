"""Asking one Triton: the only file that knows tritonclient; what its errors mean is in `triton_errors.py`.

What was measured on Triton 2.51 and is kept by tests:

* A sequence gets its id from Triton: ids that several generators choose would meet, and the second of two equal ones
  ends the first. The START and END flags are the scheduler's too; a request that bears END is never run again.
* An error in a stream is a text without a status. The header `triton_grpc_error` would have the stream end with one, and
  ends the whole server (SIGSEGV) once in some dozens of such errors.
* A request whose stub has been killed is INTERNAL after about a second, and so is every later one, while all of
  Triton's own health calls go on saying "ready".
* Cancelling a call under way may end the whole server (SIGSEGV) or take a request of the same model with it, which then
  hangs: its gRPC front end and its sequence batcher let go of a cancelled request twice. So nothing is cancelled here: a
  request that is left is asked to end by another one (`farewell`), and its stream is read to its end.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

from common.service.tracing import trace_metadata
from generator_svc.channel_tls import fault_of
from generator_svc.stage_tensors import NUMPY_TYPES, Tensors
from generator_svc.triton_errors import EndpointFailed, explain, first_line, late

MAX_MESSAGE_BYTES = 1 << 30  # 64 pictures of 1024 x 1024 are 805 MB; Triton's own limit is 2 GiB
LEFT_S = 30.0  # what a request that was left may take to end before its call is cancelled after all
CLOSE_S = 1.0  # the same once the connection is closed

_DATA_TYPES = {dtype: name for name, dtype in NUMPY_TYPES.items()}
ADMIN_HEADER = "triton-grpc-protocol-admin-key"
"""Name of the header that Triton asks for where its model repository is restricted; `--grpc-restricted-protocol` says so."""
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # one connection for each model: none waits behind another's pictures
    # A Triton that comes back is found at once: its canary decides when to try, not the channel.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_retries", 0),  # whoever chooses endpoints retries, and nobody below
)
_TLS_OPTIONS = (("grpc.min_reconnect_backoff_ms", 3000),)  # what one attempt may take, its handshake included


class LoadFailed(RuntimeError):
    """A model was not loaded; what was served goes on. The message says where and why."""


class TritonClient:
    """One connection to one Triton, made in the event loop that uses it; it connects at the first call."""

    def __init__(self, address: str, *, name: str = "", credentials: grpc.ChannelCredentials | None = None) -> None:
        """
        Args:
            address: host:port or unix:/path.
            name: that its certificate has to bear; empty: the address's host.
            credentials: of TLS; None: the connection is in the clear.
        """
        self.address = address
        self.name = name
        self.credentials = credentials
        options = dict(_OPTIONS)
        if credentials is not None:
            options |= dict(_TLS_OPTIONS) | ({"grpc.default_authority": name} if name else {})
        self._client = triton.InferenceServerClient(address, creds=credentials, channel_args=list(options.items()))
        self._left: set[asyncio.Future[Any]] = set()

    async def stream(
        self, model: str, tensors: Tensors, *, timeout_s: float | None, farewell: Tensors | None = None
    ) -> AsyncGenerator[Tensors]:
        """Ask a model that answers many times.

        Args:
            model: its name; the version is the one that is served.
            tensors: inputs by name.
            timeout_s: what the whole answer may take; Triton is told, too. None: there is no limit.
            farewell: what ends the request at the model, sent under the same request id when the iterator is left
                (`aclosing`) before its last answer. None: it ends soon by itself.

        Raises:
            ServiceError, RequestRefused: see `explain`.
        """
        name = uuid.uuid4().hex if farewell else ""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        answers = self._ask(model, tensors, name, timeout_s)
        try:
            while (answer := await answers.next(until)) is not None:
                yield answer
        finally:
            if not answers.reading.done():
                self._see_off(answers, self._part(model, name, answers, farewell))

    async def infer(self, model: str, tensors: Tensors, *, timeout_s: float | None) -> Tensors:
        """Ask a model that answers once; the rest as in `stream`."""
        where = f"{model} at {self.address}"
        limit_s = None if timeout_s is None else timeout_s + LEFT_S
        asking = asyncio.ensure_future(
            self._client.infer(
                model,
                _inputs(tensors),
                timeout=_microseconds(timeout_s),
                client_timeout=limit_s,
                headers=dict(trace_metadata()),
            )
        )
        self._left.add(asking)
        asking.add_done_callback(self._forget)
        await asyncio.wait({asking}, timeout=timeout_s)
        if not asking.done():
            raise late(where)
        try:
            return _outputs(asking.result())
        except InferenceServerException as error:
            raise _explained(error, where) from error

    def _ask(self, model: str, tensors: Tensors, name: str, timeout_s: float | None) -> _Answers:
        request = {
            "model_name": model,
            "inputs": _inputs(tensors),
            "timeout": _microseconds(timeout_s),
            "request_id": name,
        }

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield request

        limit_s = None if timeout_s is None else timeout_s + LEFT_S
        responses: Any = self._client.stream_infer(requests(), stream_timeout=limit_s, headers=dict(trace_metadata()))
        return _Answers(responses, f"{model} at {self.address}")

    def _see_off(self, answers: _Answers, parting: Coroutine[Any, Any, None]) -> None:
        answers.is_left = True
        task = asyncio.create_task(parting)
        self._left.add(task)
        task.add_done_callback(self._forget)

    async def _part(self, model: str, name: str, answers: _Answers, farewell: Tensors | None) -> None:
        """Have a request that was left end, and wait for that."""
        said: _Answers | None = None
        try:
            async with asyncio.timeout(LEFT_S):
                if farewell is not None and not answers.is_final:
                    said = self._ask(model, farewell, name, LEFT_S)
                    said.is_left = True
                    await asyncio.shield(said.reading)
                await asyncio.shield(answers.reading)
        except TimeoutError:
            pass
        finally:
            for each in (answers, said):
                if each:
                    each.cancel()

    def _forget(self, ended: asyncio.Future[Any]) -> None:
        self._left.discard(ended)
        if not ended.cancelled():
            ended.exception()  # whoever asked has been told, or has gone

    async def is_live(self, timeout_s: float) -> bool:
        """Whether Triton itself answers within so many seconds; its models may not."""
        try:
            return bool(await self._client.is_server_live(client_timeout=timeout_s))
        except InferenceServerException:
            return False

    async def check_ready(self, timeout_s: float) -> None:
        """Ask Triton's own health, which says whether every model is loaded, as a probe over gRPC would.

        Raises:
            ServiceError: it does not answer, or is not ready.
        """
        where = f"Triton at {self.address}"
        try:
            is_ready = await self._client.is_server_ready(client_timeout=timeout_s)
        except InferenceServerException as error:
            raise _explained(error, where) from error
        if not is_ready:
            raise EndpointFailed(f"{where} is not ready", kind="not_loaded", is_down=False)

    async def load(self, model: str, *, admin_key: str, timeout_s: float) -> None:
        """Have Triton read a model's configuration again and serve the version that it names; returns when it does.

        Args:
            admin_key: what `ADMIN_HEADER` must say; empty: no such header is sent.

        Raises:
            LoadFailed: it does not, or not within `timeout_s`.
        """
        headers = {ADMIN_HEADER: admin_key} if admin_key else None
        try:
            await self._client.load_model(model, headers=headers, client_timeout=timeout_s)
        except InferenceServerException as error:
            said = first_line(str(error.message()))
            said = fault_of(said) or said
            if ADMIN_HEADER in said:
                said = "the admin key is missing, or is another's"
            raise LoadFailed(f"Triton at {self.address}: {said}") from None

    async def rest(self, timeout_s: float) -> None:
        """Wait until nothing that was left is under way any more, so many seconds at most."""
        if self._left:
            await asyncio.wait(set(self._left), timeout=timeout_s)

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        await self.rest(CLOSE_S)
        for task in set(self._left):
            task.cancel()
        await self._client.close()


class _Answers:
    """The answers of one stream, read by a task of its own: gRPC cancels a call when whoever reads it is cancelled.

    Attributes:
        reading: over when the stream is.
        is_final: whether the last answer has come; its stream ends at once.
        is_left: nobody takes answers any more.
    """

    def __init__(self, responses: Any, where: str) -> None:
        self.is_final = False
        self.is_left = False
        self._responses = responses
        self._where = where
        self._come: asyncio.Queue[Tensors | Exception | None] = asyncio.Queue()
        self.reading = asyncio.create_task(self._read())

    async def next(self, until: float | None) -> Tensors | None:
        """The next answer; None after the last.

        Args:
            until: time.monotonic() of the deadline.

        Raises:
            DeadlineExceeded: it has not come by then.
            ServiceError, RequestRefused: see `explain`.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(None if until is None else loop.time() + until - time.monotonic()):
                come = await self._come.get()
        except TimeoutError:
            raise late(self._where) from None
        if isinstance(come, Exception):
            raise come
        return come

    def cancel(self) -> None:
        """End the call by force, where it has not ended."""
        self._responses.cancel()

    async def _read(self) -> None:
        try:
            async for result, error in self._responses:
                self.is_final = self.is_final or error is not None or _is_final(result)
                if not self.is_left:
                    said = None if error is None else explain(None, error.message() or "", where=self._where)
                    self._come.put_nowait(said or _outputs(result))
        except grpc.aio.AioRpcError as error:
            self._come.put_nowait(explain(error.code(), error.details() or "", where=self._where))
        except Exception as error:
            self._come.put_nowait(error)
        finally:
            self._come.put_nowait(None)


def _explained(error: InferenceServerException, where: str) -> Exception:
    name = str(error.status() or "").removeprefix("StatusCode.")
    return explain(getattr(grpc.StatusCode, name, None), error.message() or "", where=where)


def _is_final(result: Any) -> bool:
    said = result.get_response().parameters
    return "triton_final_response" in said and said["triton_final_response"].bool_param


def _inputs(tensors: Mapping[str, np.ndarray]) -> list[triton.InferInput]:
    inputs: list[triton.InferInput] = []
    for name, array in tensors.items():
        each = triton.InferInput(name, list(array.shape), _DATA_TYPES[array.dtype])
        each.set_data_from_numpy(array)
        inputs.append(each)
    return inputs


def _outputs(result: Any) -> Tensors:
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def _microseconds(timeout_s: float | None) -> int | None:
    return None if timeout_s is None else max(1, int(timeout_s * 1e6))
