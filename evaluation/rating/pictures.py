"""Pictures as raters get them: nothing but pixels, all of one size and one format, whoever drew them."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import over_color, rasterize
from common.scenes import WHITE
from evaluation.rating.items import Shown

MEDIA_TYPE = "image/webp"
CLOSER = 0.8  # of the side: what a zoomed picture shows
TILES = 8  # a side, of a scrambled picture
_KEPT = 256  # encoded pictures in memory: some 50 MB at 512 pixels
_EFFORT = 0  # of WebP, of 0 to 6; more takes seven times as long for files an eighth smaller
_FORMATS = {".jpeg": "jpg"}


class Renderer:
    """Makes the bytes of a picture, without loss and without metadata, and keeps the last ones."""

    def __init__(self, side: int) -> None:
        """`side`: pixels; a picture of another size is fitted into the square, on white."""
        self.side = side
        self._kept = lru_cache(_KEPT)(self._encode)

    def encode(self, shown: Shown) -> bytes:
        """WebP of [side, side].

        Raises:
            ImageError: the file is no picture.
            OSError: it cannot be read.
        """
        return self._kept(shown)

    def _encode(self, shown: Shown) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(changed(read(shown.path, self.side), shown)).save(
            stream, "WEBP", lossless=True, quality=0, method=_EFFORT
        )
        return stream.getvalue()


def read(path: Path, side: int) -> np.ndarray:
    """uint8 [side, side, 3] of a picture's file, on white; errors as of `Renderer.encode`."""
    suffix = path.suffix.lower()
    return over_color(rasterize(path.read_bytes(), _FORMATS.get(suffix, suffix[1:]), side), WHITE)


def changed(pixels: np.ndarray, shown: Shown) -> np.ndarray:
    """uint8 [S, S, 3] with the change of an attention check."""
    if shown.change == "scrambled":
        return _scrambled(pixels, random.Random(shown.seed))
    if shown.change.startswith("closer"):
        pixels = _closer(pixels)
    return pixels[:, ::-1] if shown.change.endswith("mirrored") else pixels


def _closer(pixels: np.ndarray) -> np.ndarray:
    side = len(pixels)
    edge = round(side * (1 - CLOSER) / 2)
    box = (edge, edge, side - edge, side - edge)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS, box=box))


def _scrambled(pixels: np.ndarray, draw: random.Random) -> np.ndarray:
    """Its tiles in another order, each turned: any picture's looks broken, the simplest icon's too."""
    edge = len(pixels) // TILES
    places = [(row * edge, column * edge) for row in range(TILES) for column in range(TILES)]
    result = pixels.copy()
    for (y, x), (from_y, from_x) in zip(places, draw.sample(places, len(places)), strict=True):
        tile = pixels[from_y : from_y + edge, from_x : from_x + edge]
        result[y : y + edge, x : x + edge] = np.rot90(tile, draw.randrange(4))
    return result
