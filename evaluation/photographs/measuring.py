"""Features of pictures in shards of files, and the scores that are read from them without holding pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from common.files import write_atomic
from evaluation.scores.clip_score import clip_scores
from evaluation.scores.cmmd import cmmd
from evaluation.scores.frechet import Gaussian, frechet_distance, gaussian_of
from evaluation.scores.intervals import Interval, mean_interval
from retrieval_svc.embedding import Embedder

SHARD = 256  # pictures


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What features are of. `inception` None: no FID."""

    clip: Embedder
    inception: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    prefix: str = ""

    def features(self, pictures: Sequence[np.ndarray], prompts: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays by name: `clip`, `inception`, and with prompts `clip_score`, a row a picture."""
        found = {"clip": self.clip.images(pictures).astype(np.float32)}
        if self.inception is not None:
            found["inception"] = self.inception(pictures).astype(np.float32)
        if prompts is not None:
            texts = self.clip.texts([self.prefix + prompt for prompt in prompts])
            found["clip_score"] = clip_scores(texts, found["clip"])
        return found


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What drawn pictures are compared with: CLIP embeddings, and the Gaussian of Inception features if there are any."""

    clip: np.ndarray
    gaussian: Gaussian | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one point of the sweep.

    Attributes:
        fid: None: there were no Inception weights.
        neighbors: that shaped a picture, on average: fewer than k where retrieval found fewer.
    """

    fid: float | None
    cmmd: float
    clip_score: Interval
    neighbors: float


class FeatureShards:
    """The shards of a folder, each a safetensors file of `SHARD` pictures, written whole."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder = folder
        self._total = total

    def __len__(self) -> int:
        return -(-self._total // SHARD)

    def rows(self, number: int) -> range:
        """The pictures of a shard."""
        return range(number * SHARD, min(self._total, (number + 1) * SHARD))

    def path(self, number: int) -> Path:
        """Its file."""
        return self._folder / f"features-{number:05d}.safetensors"

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a shard."""
        write_atomic(self.path(number), save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))

    def read(self, number: int, wanted: str) -> np.ndarray:
        """One of its arrays.

        Raises:
            ValueError: the file is damaged, or of another number of pictures; the message names it.
        """
        try:
            array = load_file(self.path(number))[wanted]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"features: {self.path(number)} cannot be read ({error}); remove it to draw anew"
            ) from None
        if len(array) != len(self.rows(number)):
            raise ValueError(f"features: {self.path(number)} holds {len(array)} pictures, not {len(self.rows(number))}")
        return array

    def stream(self, wanted: str) -> Iterator[np.ndarray]:
        """One array, shard by shard."""
        for number in range(len(self)):
            yield self.read(number, wanted)


def measure_reference(
    shards: FeatureShards,
    pictures: Callable[[range], Iterable[np.ndarray]],
    encoders: Encoders,
    told: Callable[[int], None],
) -> Reference:
    """Features of the reference pictures, those that are not there yet; `pictures` gives those of some numbers."""
    for number in range(len(shards)):
        rows = shards.rows(number)
        if not shards.path(number).is_file():
            shards.write(number, encoders.features(list(islice(pictures(rows), len(rows)))))
        told(rows.stop)
    gaussian = gaussian_of(shards.stream("inception")) if encoders.inception is not None else None
    return Reference(clip=np.concatenate(list(shards.stream("clip"))), gaussian=gaussian)


def scores_of(shards: FeatureShards, reference: Reference) -> Scores:
    """The scores of a point whose shards are all there."""
    fid = None
    if reference.gaussian is not None:
        fid = frechet_distance(gaussian_of(shards.stream("inception")), reference.gaussian)
    return Scores(
        fid=fid,
        cmmd=cmmd(np.concatenate(list(shards.stream("clip"))), reference.clip),
        clip_score=mean_interval(np.concatenate(list(shards.stream("clip_score")))),
        neighbors=float(np.concatenate(list(shards.stream("neighbors"))).mean()),
    )
