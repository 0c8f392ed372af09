"""Answers requests for embeddings that come as frames over a socket; knows no model and no torch."""

from __future__ import annotations

import logging
import queue
import socket
import threading

import numpy as np

from retrieval_svc.embedding import Embedder
from retrieval_svc.frames import Frame, FrameError, receive_frame, send_frame

MAX_BATCH = 64  # requests for texts that share one pass

log = logging.getLogger(__name__)


def answer_all(service: socket.socket, embedder: Embedder) -> None:
    """Answer requests until the service has gone; texts that came meanwhile share one pass."""
    arrived: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(service, arrived), daemon=True).start()
    while (batch := _gather(arrived)) is not None:
        for frames in _alike(batch):
            _answer(service, embedder, frames)


def _read(service: socket.socket, arrived: queue.SimpleQueue[Frame | None]) -> None:
    try:
        while (frame := receive_frame(service)) is not None:
            arrived.put(frame)
    except (OSError, FrameError):
        pass  # the service has gone in the middle of a word
    arrived.put(None)


def _gather(arrived: queue.SimpleQueue[Frame | None]) -> list[Frame] | None:
    """What has arrived, at least one; None at the end."""
    batch = [arrived.get()]
    while len(batch) < MAX_BATCH and not arrived.empty():
        batch.append(arrived.get())
    frames = [frame for frame in batch if frame is not None]
    return frames if len(frames) == len(batch) else None


def _alike(batch: list[Frame]) -> list[list[Frame]]:
    """All requests for texts together, each for pictures alone: it is a batch already."""
    texts = [frame for frame in batch if "texts" in frame.said]
    pictures = [[frame] for frame in batch if "texts" not in frame.said]
    return [texts, *pictures] if texts else pictures


def _answer(service: socket.socket, embedder: Embedder, frames: list[Frame]) -> None:
    try:
        vectors = _embed(embedder, frames)
    except Exception as error:  # one bad batch does not take the model down
        log.error("embedding failed", extra={"error": type(error).__name__})
        for frame in frames:
            send_frame(service, Frame(said={"id": frame.said["id"], "error": type(error).__name__}))
        return
    for frame, found in zip(frames, vectors, strict=True):
        send_frame(service, Frame(said={"id": frame.said["id"]}, arrays=[found]))


def _embed(embedder: Embedder, frames: list[Frame]) -> list[np.ndarray]:
    if "texts" not in frames[0].said:
        return [np.asarray(embedder.images(frames[0].arrays), np.float32)]
    texts = [text for frame in frames for text in frame.said["texts"]]
    together = np.asarray(embedder.texts(texts), np.float32)
    ends = np.cumsum([len(frame.said["texts"]) for frame in frames])
    return np.split(together, ends[:-1])
