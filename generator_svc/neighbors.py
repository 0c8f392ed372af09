"""The pairs that shape a picture, as the pipeline sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.images import ImageError, over_color, rasterize
from common.scenes import WHITE
from common.service.errors import DataLoss
from generator_svc.order import Reference
from generator_svc.picture_files import read


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One pair: a retrieved one, or a reference of the caller's; the fields are those of retrieval.proto.

    Attributes:
        pair_id, entity: empty for a reference.
        image_sha256: of the file as the knowledge base, or the caller, has it.
        is_reference: whether it is the caller's own.
    """

    pair_id: str
    caption: str
    entity: str
    image: bytes
    image_format: str
    image_sha256: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int
    is_reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What retrieval answered, after the caller's own references: neighbors, best first, and which index they are of.

    Attributes:
        method: its name; METHOD_UNSPECIFIED where retrieval was not asked.
        degraded_reason: why it was asked in vain, and the order is drawn nevertheless.
        failed_legs: names of its methods that could not answer, so that the other answered alone.
    """

    neighbors: tuple[Neighbor, ...] = ()
    knowledge_base: str = ""
    index_fingerprint: str = ""
    shortfall_reason: str = ""
    method: str = "METHOD_UNSPECIFIED"
    degraded_reason: str = ""
    failed_legs: tuple[str, ...] = ()

    @property
    def num_references(self) -> int:
        return sum(neighbor.is_reference for neighbor in self.neighbors)

    def after(self, references: Sequence[Neighbor]) -> Retrieved:
        """The same behind references; ranks go on."""
        behind = (replace(each, rank=each.rank + len(references)) for each in self.neighbors)
        return replace(self, neighbors=(*references, *behind))


def take_references(references: Sequence[Reference]) -> tuple[Neighbor, ...]:
    """The caller's own pairs as neighbors.

    Raises:
        InvalidArgument: one is no picture that can be drawn; names it.
    """
    taken: list[Neighbor] = []
    for i, reference in enumerate(references):
        picture = read(f"references[{i}].image", reference.image)
        taken.append(
            Neighbor(
                pair_id="",
                caption=reference.caption,
                entity="",
                image=picture.image,
                image_format=picture.format,
                image_sha256=hashlib.sha256(reference.image).hexdigest(),
                facets={},
                author=reference.author,
                source=reference.source,
                license=reference.license,
                score=0.0,
                rank=i + 1,
                is_reference=True,
            )
        )
    return tuple(taken)


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
            raise DataLoss(f"neighbor {neighbor.pair_id or neighbor.rank!r}: {error}") from None
    return pictures
