"""A typed client of the trainer: runs are started, watched, ended, and their weights exported."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Self

from client import training_calls as calls
from client.channel import Tls
from client.connection import Connection
from client.health import ServiceHealth
from client.retry import RetryPolicy
from client.run_cursor import Patience, RunCursor
from client.training_calls import TIMEOUT_S, WATCH_TIMEOUT_S, TrainingFailed
from client.training_types import Export, Figures, PodResources, Progress, Run, RunEvent, RunSpec, SampleGrid

__all__ = [
    "Export",
    "Figures",
    "PodResources",
    "Progress",
    "Run",
    "RunEvent",
    "RunSpec",
    "SampleGrid",
    "TrainerClient",
    "TrainingFailed",
]


class TrainerClient:
    """One channel to a trainer; safe to use from several threads. Everything here raises TrainingFailed."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Connects at the first call. Every call is tried again while the service is away.

        Args:
            address: see `client.channel.open_channel`.
            api_key: an admin key starts, cancels, deletes and exports, a read key looks.
            tls: whom to trust; None: the connection is in the clear.
            timeout_s: deadline of each call but those that wait for a run or an export.
            retry: None: `RetryPolicy()`.
        """
        policy = retry or RetryPolicy()
        self._connection = Connection(address, api_key=api_key, tls=tls, retry=policy, failure=TrainingFailed)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._connection.close()

    def start(self, spec: RunSpec, *, name: str = "", request_id: str = "") -> Run:
        """Start a run, or go on with the one of that name.

        Args:
            name: empty: the service makes one.
            request_id: a UUID: the same one again starts nothing again; empty: a new one.

        Raises:
            FieldError: an executor is none of the contract's, or a number does not fit its field; a ValueError.
        """
        return self._connection.ask(calls.start(spec, name, request_id), timeout_s=self._timeout_s)

    def get(self, name: str) -> Run:
        """One run."""
        return self._connection.ask(calls.get(name), timeout_s=self._timeout_s)

    def list(self, *, states: Sequence[str] = (), page_size: int = 0) -> Iterator[Run]:
        """Runs by name, page by page; `states` empty: in any state."""
        token = ""
        while True:
            runs, token = self._connection.ask(calls.list_page(states, page_size, token), timeout_s=self._timeout_s)
            yield from runs
            if not token:
                return

    def watch(
        self, name: str, *, from_step: int = 0, samples: bool = True, timeout_s: float = WATCH_TIMEOUT_S
    ) -> Generator[RunEvent, None, None]:
        """What a run says until it is over. A service that ends meanwhile and comes back is asked again where it was.

        Closing the generator cancels the call.
        """
        cursor, give_up = RunCursor(from_step), time.monotonic() + timeout_s
        while True:
            call = calls.watch(name, cursor.from_step, samples)
            try:
                with closing(self._connection.stream(call, timeout_s=give_up - time.monotonic())) as events:
                    for event in events:
                        if cursor.takes(event):
                            yield event
                return
            except TrainingFailed as failure:
                time.sleep(cursor.pause_s(failure))

    def cancel(self, name: str) -> Run:
        """End a run; while it saves its state it is still running, and `cancelling`."""
        return self._connection.ask(calls.cancel(name), timeout_s=self._timeout_s)

    def delete(self, name: str, *, missing_ok: bool = False) -> None:
        """Remove a run that is over, with all that it has saved; what was exported of it stays.

        Args:
            missing_ok: where there is no such run, do nothing.
        """
        self._connection.ask(calls.delete(name, missing_ok), timeout_s=self._timeout_s)

    def export(
        self,
        name: str,
        weights: str,
        *,
        on_progress: Callable[[Export], object] | None = None,
        request_id: str = "",
        replace: bool = False,
        timeout_s: float = WATCH_TIMEOUT_S,
    ) -> Export:
        """Write a run's averaged weights to a folder of the service's, and wait for it.

        Args:
            weights: the folder, under the service's weights folder.
            on_progress: is told how far it is.
            request_id: as of `start`.
            replace: also weights of that stage that saw more examples than this run.
        """
        call = calls.export(name, weights, request_id, replace)
        patience, give_up = Patience(), time.monotonic() + timeout_s
        last: Export | None = None
        while True:
            try:
                with closing(self._connection.stream(call, timeout_s=give_up - time.monotonic())) as said:
                    for last in said:
                        patience.heard()
                        if on_progress is not None:
                            on_progress(last)
                return calls.exported(last)
            except TrainingFailed as failure:
                time.sleep(patience.pause_s(failure))

    def health(self) -> tuple[ServiceHealth, ...]:
        """Whether the service answers; never fails."""
        return self._connection.health(calls.SERVICES)
