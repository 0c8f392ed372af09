"""The text encoder as a model repository holds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import CheckpointError, read_manifest
from common.files import sha256_file
from common.text import TextEncoder
from generator_svc.stage_inputs import EncodedTexts

ENCODER = "encoder"  # folder of a version's encoder, as `transformers` reads it
MAX_PASS = 64  # texts of one pass


class ServedTexts:
    """Encodes the texts of several requests together."""

    def __init__(self, folder: Path, *, device: str, threads: int) -> None:
        """Load a version; every file must be as the manifest says.

        Raises:
            CheckpointError: a file is missing, altered or unknown.
        """
        if threads:
            torch.set_num_threads(threads)
        check_files(folder)
        self._encoder = TextEncoder(str(folder / ENCODER), device=device)
        list(self.encode([["a"], ["a red apple", "b"]]))

    def encode(self, requests: Sequence[Sequence[str]]) -> Iterator[EncodedTexts]:
        """The states of each request's texts, as long as the longest of its own."""
        texts = [text for request in requests for text in request]
        states: list[np.ndarray] = []
        for first in range(0, len(texts), MAX_PASS):
            encoded, mask = self._encoder.encode(texts[first : first + MAX_PASS])
            lengths = mask.sum(1).tolist()
            states += [row[:length].cpu().numpy() for row, length in zip(encoded, lengths, strict=True)]
        for request in requests:
            yield _together(states[: len(request)])
            states = states[len(request) :]


def check_files(folder: Path) -> None:
    """See that a version holds the files of its manifest, and no byte of them is another.

    Raises:
        CheckpointError: it does not; the message names the file.
    """
    for name, line in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"text encoder: {path} is missing, the manifest names it")
        if (digest := sha256_file(path)) != line["sha256"]:
            raise CheckpointError(
                f"text encoder: {path} is corrupted: sha256 {digest[:12]}…, manifest {line['sha256'][:12]}…"
            )


def _together(states: Sequence[np.ndarray]) -> EncodedTexts:
    length = max(len(row) for row in states)
    mask = np.array([[i < len(row) for i in range(length)] for row in states])
    padded = [np.pad(row, ((0, length - len(row)), (0, 0))) for row in states]
    return EncodedTexts(states=np.stack(padded), mask=mask)
