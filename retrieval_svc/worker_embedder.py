"""An embedder whose model lives in a process of its own (`clip_worker.py`), started here and started again if it ends."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from common.service.errors import Unavailable
from retrieval_svc.frames import Frame, FrameError, receive_frame, send_frame

LOADING_RETRY_S = 2.0
LOST_RETRY_S = 1.0
ANSWER_TIMEOUT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_END_TIMEOUT_S = 2.0
_WORKER = ("-m", "retrieval_svc.clip_worker")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Model:
    name: str
    size: int
    image_side: int


class WorkerEmbedder:
    """Implements `Embedder`. Until the model is loaded everything here raises Unavailable, which says when to come again."""

    def __init__(
        self, model: str, *, device: str = "cpu", threads: int = 0, command: Sequence[str] | None = None
    ) -> None:
        """Start the worker and return; the model loads meanwhile.

        Args:
            model: folder or name of the model; "packaged" is the demonstration's.
            device: cpu, cuda or cuda:N.
            threads: CPU threads of one pass; 0: one for each core.
            command: what is run instead of our interpreter with `clip_worker`, for tests.
        """
        flags = ("--model", model, "--device", device, "--threads", str(threads))
        self._command = (*(command or (sys.executable, *_WORKER)), *flags)
        self._model: _Model | None = None
        self._state = "the CLIP model is loading"
        self._pause_s = _FIRST_PAUSE_S
        self._stream: socket.socket | None = None  # to the worker
        self._connection: socket.socket | None = None  # the same, once the worker answers
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, Future[np.ndarray]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of all of the above
        self._sending = threading.Lock()
        self._closing = threading.Event()
        self._known = threading.Event()  # the model is loaded, or cannot be
        self._keeper = threading.Thread(target=self._keep, name="clip-worker", daemon=True)
        self._keeper.start()

    @property
    def name(self) -> str:
        """Names the weights."""
        return self._loaded().name

    @property
    def size(self) -> int:
        """Size of the embeddings."""
        return self._loaded().size

    @property
    def image_side(self) -> int:
        """Pictures are best given at this side, in pixels."""
        return self._loaded().image_side

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, size], rows of unit length."""
        return self._ask(Frame(said={"texts": list(texts)}))

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The same of uint8 RGB pictures [H, W, 3]."""
        return self._ask(Frame(said={"images": len(images)}, arrays=[np.asarray(i, np.uint8) for i in images]))

    def wait_loaded(self, timeout_s: float) -> None:
        """Wait until the model is loaded.

        Raises:
            Unavailable: it cannot be, or not in that time.
        """
        self._known.wait(timeout_s)
        self._loaded()

    def close(self) -> None:
        """End the worker."""
        self._closing.set()
        with self._lock:
            stream, process = self._stream, self._process
            if stream is not None:
                _shut(stream)
        if process is not None:
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._keeper.join()

    def _loaded(self) -> _Model:
        if self._model is None:
            raise Unavailable(self._state, retry_after_s=LOADING_RETRY_S, reason="MODEL_LOADING")
        return self._model

    def _ask(self, frame: Frame) -> np.ndarray:
        self._loaded()
        answer = Future[np.ndarray]()
        number = next(self._numbers)
        with self._lock:
            connection = self._connection
            if connection is None:
                raise Unavailable(self._state, retry_after_s=LOST_RETRY_S, reason="MODEL_LOST")
            self._waiting[number] = answer
        try:
            with self._sending:
                send_frame(connection, Frame(said=frame.said | {"id": number}, arrays=frame.arrays))
            return answer.result(ANSWER_TIMEOUT_S)
        except (OSError, CancelledError):  # TimeoutError is an OSError
            text = "the process of the CLIP model has ended, or does not answer"
            raise Unavailable(text, retry_after_s=LOST_RETRY_S, reason="MODEL_LOST") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _keep(self) -> None:
        """Run one worker after the other; wait longer and longer where they do not last."""
        while not self._closing.is_set():
            try:
                self._run_one()
            except (OSError, FrameError, KeyError, ValueError) as error:
                log.error("CLIP worker lost", extra={"error": type(error).__name__})
            self._known.set()
            if not self._closing.is_set():
                log.warning("CLIP worker ended", extra={"again_in_s": self._pause_s})
            self._closing.wait(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _run_one(self) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                )
            with self._lock:
                self._stream, self._process = ours, process
            try:
                if self._closing.is_set():
                    return
                started = time.monotonic()
                if self._greet(ours):
                    log.info("CLIP model loaded", extra={"seconds": round(time.monotonic() - started, 2)})
                    self._receive(ours)
            finally:
                self._lose(process)

    def _greet(self, stream: socket.socket) -> bool:
        """Take the worker's first word; False where it cannot load the model."""
        hello = receive_frame(stream)
        if hello is None or "hello" not in hello.said:
            reason = hello.said.get("failed", "it does not say why") if hello else "its process ended"
            self._state = f"the CLIP model cannot be loaded: {reason}"
            log.error("CLIP model not loaded", extra={"reason": reason})
            return False
        with self._lock:
            self._model, self._connection = _Model(**hello.said["hello"]), stream
        self._pause_s = _FIRST_PAUSE_S
        self._known.set()
        return True

    def _receive(self, stream: socket.socket) -> None:
        while (frame := receive_frame(stream)) is not None:
            with self._lock:
                answer = self._waiting.pop(frame.said["id"], None)
            if answer is None:
                continue  # whoever asked has given up
            if "error" in frame.said:
                answer.set_exception(RuntimeError(f"the CLIP model failed with {frame.said['error']}"))
            else:
                answer.set_result(frame.arrays[0])

    def _lose(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            stream, self._stream, self._connection = self._stream, None, None
            waiting, self._waiting = self._waiting, {}
            if self._model is not None:
                self._state = "the process of the CLIP model has ended; it is started again"
            if stream is not None:
                _shut(stream)
        for answer in waiting.values():
            answer.cancel()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it was already
        connection.shutdown(socket.SHUT_RDWR)
