"""Searching a Tantivy index in a process of its own (`lexical_worker.py`), started here and started again if it ends."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from retrieval_svc.bm25_search import scored
from retrieval_svc.lexical_channel import DONE, FAILED, RELOAD, receive_message, send_message, set_timeout
from retrieval_svc.pairs import Lookup, Scored

NUM_CHANNELS = 8  # lookups that it is asked at once, at most
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 60, 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 60.0
_LASTED_S = 60.0  # who has lived so long is started again at once
_END_TIMEOUT_S = 2.0
_WORKER = (sys.executable, "-m", "retrieval_svc.lexical_worker")
_ENCODER = msgspec.msgpack.Encoder()
_ANSWER = msgspec.msgpack.Decoder(list[tuple[float, bytes]])

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Running:
    """One worker: it is told of commits over `control`, and asked over a channel that nobody else has meanwhile."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    channels: Sequence[socket.socket]
    free: list[socket.socket]


class LexicalProcess:
    """Answers lookups from the newest commit it was told of, or not at all: the caller then searches himself."""

    def __init__(self, folder: Path, *, command: Sequence[str] = _WORKER) -> None:
        """Start the worker on the index in `folder` and return; until it has opened it, nothing is answered."""
        self._command = (*command, "--folder", str(folder))
        self._running: _Running | None = None  # what answers
        self._process: subprocess.Popen[bytes] | None = None
        self._telling = threading.Lock()
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lexical-worker", daemon=True)
        self._keeper.start()

    @property
    def is_answering(self) -> bool:
        """Whether there is a worker that has opened the index."""
        return self._running is not None

    def search(self, lookup: Lookup) -> list[Scored] | None:
        """See `LexicalIndex.search`; None: it cannot answer, or fails to."""
        running = self._running
        if running is None:
            return None
        question = _ENCODER.encode(lookup)
        try:
            channel = running.free.pop()
        except IndexError:
            return None  # it has enough to do
        try:
            send_message(channel, question)
            answer = receive_message(channel)
        except (OSError, EOFError):
            self._lose(running)
            return None
        running.free.append(channel)
        return None if answer == FAILED else [scored(*found) for found in _ANSWER.decode(answer)]

    def show_newest(self) -> None:
        """Lookups that are asked after this see the newest commit on disk."""
        with self._telling:
            running = self._running
            if running is not None and not _reloaded(running):
                self._lose(running)

    def close(self) -> None:
        """End the worker."""
        self._closing.set()
        process = self._process
        if process is not None:
            process.terminate()
        self._keeper.join()

    def _lose(self, running: _Running) -> None:
        """Who does not answer does not come back; the keeper starts another."""
        if self._running is running:
            self._running = None
        running.process.kill()

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            started = time.monotonic()
            try:
                self._run_one()
            except OSError as error:
                log.error("BM25 worker not started", extra={"error": type(error).__name__})
            if time.monotonic() - started > _LASTED_S:
                pause_s = _FIRST_PAUSE_S
            if not self._closing.is_set():
                log.warning("BM25 worker ended", extra={"again_in_s": pause_s})
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _run_one(self) -> None:
        running = self._started()
        self._process = running.process
        try:
            if not self._closing.is_set() and _reloaded(running):
                # Once more, as there may have been a commit meanwhile; a later one is told to who is `_running`.
                with self._telling:
                    set_timeout(running.control, ANSWER_TIMEOUT_S)
                    if _reloaded(running):
                        self._running = running
                        log.info("BM25 worker ready")
            if self._running is not running:
                running.process.kill()
            while running.process.poll() is None and not self._closing.is_set():
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait()
        finally:
            self._end(running)

    def _end(self, running: _Running) -> None:
        self._running = None
        running.process.terminate()
        try:
            running.process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
        for stream in (running.control, *running.channels):
            stream.close()

    def _started(self) -> _Running:
        pairs = [socket.socketpair() for _ in range(NUM_CHANNELS + 1)]
        ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        try:
            numbers = [stream.fileno() for stream in theirs]
            process = subprocess.Popen(
                (*self._command, "--sockets", *map(str, numbers)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=numbers,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C goes to everybody; the service says when it is over
            )
        except BaseException:
            for stream in ours:
                stream.close()
            raise
        finally:
            for stream in theirs:
                stream.close()
        for stream in ours:
            set_timeout(stream, START_TIMEOUT_S if stream is ours[0] else ANSWER_TIMEOUT_S)
        return _Running(process=process, control=ours[0], channels=ours[1:], free=ours[1:])


def _reloaded(running: _Running) -> bool:
    try:
        send_message(running.control, RELOAD)
        return receive_message(running.control) == DONE
    except (OSError, EOFError):
        return False
