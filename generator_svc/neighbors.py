"""The pairs that shape a picture, as the pipeline sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.images import ImageError, over_color, rasterize
from common.scenes import WHITE
from common.service.errors import DataLoss


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One retrieved pair; the fields are those of retrieval.proto."""

    pair_id: str
    caption: str
    entity: str
    image: bytes
    image_format: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What retrieval answered: neighbors, best first, which index they come from, and the method's name."""

    neighbors: tuple[Neighbor, ...] = ()
    knowledge_base: str = ""
    index_fingerprint: str = ""
    shortfall_reason: str = ""
    method: str = "METHOD_UNSPECIFIED"


def draw_neighbors(neighbors: Sequence[Neighbor], size: int) -> np.ndarray:
    """The neighbors' pictures on white, as training sees them: uint8 [K, size, size, 3].

    Raises:
        DataLoss: a picture cannot be drawn; the description names its pair.
    """
    pictures = np.zeros((len(neighbors), size, size, 3), np.uint8)
    for i, neighbor in enumerate(neighbors):
        try:
            pictures[i] = over_color(rasterize(neighbor.image, neighbor.image_format, size), WHITE)
        except ImageError as error:
            raise DataLoss(f"neighbor {neighbor.pair_id!r}: {error}") from None
    return pictures
