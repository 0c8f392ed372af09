"""Stands in for `clip_worker.py` where the model is not the subject: hashes instead of a model, no torch, and it can fail."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrieval_svc.embedding_loop import answer_all
from retrieval_svc.frames import Frame, send_frame

SIZE = 16


def hashed(content: bytes) -> np.ndarray:
    """float32 [SIZE], unit length; the same for the same content."""
    seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)
    return vector / np.linalg.norm(vector)


class FakeEmbedder:
    """Deterministic vectors without meaning."""

    name, size, image_side = "fake", SIZE, 32

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Hashes of the texts; the text "die" ends the process, "fail" raises."""
        if "die" in texts:
            os._exit(3)
        if "fail" in texts:
            raise ZeroDivisionError
        return np.stack([hashed(text.encode()) for text in texts])

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Hashes of the pixels."""
        return np.stack([hashed(image.tobytes()) for image in images])


def main(arguments: Sequence[str]) -> None:
    """`--model` says what to do: "when:FILE" (once it is there), "failed", "silent", else at once."""
    model = arguments[arguments.index("--model") + 1]
    with socket.socket(fileno=sys.stdin.fileno()) as service:
        if model == "silent":
            return
        if model == "failed":
            send_frame(service, Frame(said={"failed": "no such model"}))
            return
        while model.startswith("when:") and not Path(model.removeprefix("when:")).exists():
            time.sleep(0.01)
        fake = FakeEmbedder()
        hello = {"name": fake.name, "size": fake.size, "image_side": fake.image_side}
        send_frame(service, Frame(said={"hello": hello}))
        answer_all(service, fake)


if __name__ == "__main__":
    main(sys.argv[1:])
