"""A small knowledge base with real pictures, and an embedder that is none."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from common.corpus import Facet
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.pairs import NewPair

STYLES = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat")
STYLE = Facet(name="style", template="{value} style", values=STYLES)
SCENE_PHRASES = ("on a white background", "on a blue background", "small in the top left corner")
_DRAWN = {
    "guide dog": ("noto", "twemoji", "openmoji"),
    "dog": ("noto", "twemoji"),
    "hot dog": ("noto",),
    "blue circle": ("noto",),
    "blue heart": ("noto", "twemoji"),
    "blue book": ("noto",),
    "background picture": ("noto",),
    "old style house": ("noto", "openmoji"),
    "university": ("noto",),
    "universal remote": ("noto",),
    "1st place medal": ("noto", "twemoji"),
    "flag for cote divoire": ("noto", "twemoji"),
    "a button blood type": ("noto", "openmoji"),
    "cat": ("noto", "noto-v1", "twemoji", "openmoji", "fluent-emoji-flat"),
    "cat face": ("noto",),
}


class FakeEmbedder:
    """Deterministic vectors of no meaning: of a text by its hash, of a picture by its mean color."""

    def __init__(self, name: str = "fake-embedder", size: int = 8) -> None:
        self.name = name
        self.size = size
        self.image_side = 8
        self.calls: list[tuple[str, int]] = []  # what was embedded, and how many at once

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """A unit vector for each text."""
        self.calls.append(("texts", len(texts)))
        return np.stack([self._vector(text.encode()) for text in texts])

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """A unit vector for each picture."""
        self.calls.append(("images", len(images)))
        return np.stack([self._vector(np.round(image.mean((0, 1))).astype(np.uint8).tobytes()) for image in images])

    def _vector(self, content: bytes) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(self.size)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def make_picture(number: int) -> bytes:
    """A small PNG; another for each number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 77)).save(stream, "PNG")
    return stream.getvalue()


def small_pairs() -> list[NewPair]:
    """Entities in several styles; `cat` has the same picture in two of them; those in noto style are declared safe."""
    pairs: list[NewPair] = []
    for entity, styles in _DRAWN.items():
        for style in styles:
            is_shared = entity == "cat" and style in ("noto", "noto-v1")
            pairs.append(
                NewPair(
                    pair_id=f"{style}--{entity.replace(' ', '-')}",
                    caption=f"{entity}, {style} style, on a white background",
                    image=make_picture(1000 if is_shared else len(pairs)),
                    entity=entity,
                    facets={"style": style},
                    author=f"author of {style}",
                    source="https://example.org",
                    license="CC-BY-4.0",
                    safe=style == "noto",
                )
            )
    captioned = "red panda, noto style, on a blue background"  # imported from elsewhere: a caption and nothing more
    pairs.append(NewPair(pair_id="captioned", caption=captioned, image=make_picture(2000), safe=True))
    return pairs


def make_small(
    folder: Path,
    *,
    embedder: FakeEmbedder | None = None,
    pairs: Sequence[NewPair] | None = None,
    embedding_size: int | None = None,
) -> KnowledgeBase:
    """A knowledge base of the small pairs, or of others, caught up."""
    made = KnowledgeBase.create(
        folder,
        facets=(STYLE,),
        scene_phrases=SCENE_PHRASES,
        embedder=embedder,
        embedding_size=embedding_size,
    )
    made.upsert(small_pairs() if pairs is None else pairs)
    made.catch_up()
    return made
