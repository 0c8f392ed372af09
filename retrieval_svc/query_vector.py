"""The vector that the CLIP leg looks for: prompt, picture and embedding, mixed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from common.images import ImageError, over_color, rasterize
from common.pictures import take_in
from common.service.errors import FailedPrecondition, InvalidArgument
from retrieval_svc.embedding import Embedder
from retrieval_svc.manifest import Manifest
from retrieval_svc.retrieval import Query

CACHED_TEXTS = 4096  # 8 MiB at 512 dimensions
_WHITE = (255, 255, 255)
_SMALLEST_NORM = 1e-6  # of a mix of unit vectors: less is noise


class PictureEmbedder:
    """An embedder that speaks of texts and picture files, and never stands in for another model."""

    def __init__(self, manifest: Manifest, embedder: Embedder | None) -> None:
        self._manifest = manifest
        self._embedder = embedder
        self._cached_text = lru_cache(CACHED_TEXTS)(self._new_text)

    @property
    def is_ready(self) -> bool:
        """Whether it has a model at all."""
        return self._embedder is not None and self._manifest.embedding_size > 0

    def check(self) -> Embedder:
        """The embedder, if it is the one that made the knowledge base's embeddings.

        Raises:
            FailedPrecondition: it is another, or there is none; both are named.
        """
        name, model = self._manifest.name, self._manifest.embedding_model or "an unnamed model"
        if self._embedder is None:
            raise FailedPrecondition(
                f"knowledge base {name!r} has embeddings of {model}; this service has no model to embed with"
                " (give an embedding, and prompt and picture the weight 0)"
            )
        ours = (self._embedder.name, self._embedder.size)
        if ours != (self._manifest.embedding_model, self._manifest.embedding_size):
            raise FailedPrecondition(
                f"knowledge base {name!r} has embeddings of {model}, size {self._manifest.embedding_size}; this service"
                f" embeds with {ours[0]}, size {ours[1]} (give an embedding, and prompt and picture the weight 0)"
            )
        return self._embedder

    def text(self, text: str) -> np.ndarray:
        """float32 [D], unit length; not to be written to."""
        return self._cached_text(text)

    def pictures(self, files: list[tuple[bytes, str]]) -> np.ndarray:
        """float32 [N, D], rows of unit length, of (bytes, format).

        Raises:
            ImageError: one of them cannot be drawn.
        """
        embedder = self.check()
        side = embedder.image_side
        return embedder.images([over_color(rasterize(image, kind, side), _WHITE) for image, kind in files])

    def query(self, query: Query) -> np.ndarray:
        """The normalized mix of what the query gives, each part normalized first; float32 [D].

        Raises:
            InvalidArgument: the picture cannot be read, or the parts cancel each other out.
            FailedPrecondition: see `check`.
        """
        weights = query.weights
        mixed = np.zeros(self._manifest.embedding_size, np.float64)
        if query.prompt.strip() and weights.text:
            mixed += weights.text * _unit(self.text(query.prompt))
        if query.image and weights.image:
            try:
                picture = take_in(query.image)
                mixed += weights.image * _unit(self.pictures([(picture.image, picture.format)])[0])
            except ImageError as error:
                raise InvalidArgument("query_image", str(error).removeprefix("image: ")) from None
        if query.embedding is not None and weights.embedding:
            mixed += weights.embedding * _unit(query.embedding)
        norm = float(np.linalg.norm(mixed))
        if norm < _SMALLEST_NORM * max(weights.text, weights.image, weights.embedding):
            raise InvalidArgument("query_weights", "prompt, picture and embedding cancel each other out")
        return (mixed / norm).astype(np.float32)

    def _new_text(self, text: str) -> np.ndarray:
        vector = self.check().texts([text])[0]
        vector.setflags(write=False)
        return vector


def _unit(vector: np.ndarray) -> np.ndarray:
    wide = vector.astype(np.float64)
    return wide / np.linalg.norm(wide)
