"""Architecture of a U-Net as data. It travels with the weights; three stages differ by these values alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

PLACEMENT_SIZE = 4  # zoom and shift, each (row, column)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """One U-Net. Level i works on a grid of size / (patch * 2^i).

    Attributes:
        patch: side of the pixel squares folded into channels by the stem (pixel unshuffle).
        widths: channels of each level.
        blocks: residual blocks of each level, in the DStack and again in the UStack.
        attention: per level, whether its blocks attend to the text and to themselves.
        neighbor_attention: per level, whether its feature map attends to the neighbors'.
        head_width: channels of an attention head.
        text_width: width of the text encoder's token states; 0 for a U-Net without text.
        embedding_width: width of the noise-level embedding.
        scale: how many times larger than its low-resolution input; 1 for a U-Net without one.
        placement: whether the text says where the neighbors are read ("small in the top left corner"), and they are laid
            there, pixel by pixel, beside what attention finds.
    """

    patch: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    neighbor_attention: tuple[bool, ...]
    head_width: int
    text_width: int
    embedding_width: int
    scale: int
    placement: bool

    def __post_init__(self) -> None:
        levels = {len(self.widths), len(self.blocks), len(self.attention), len(self.neighbor_attention)}
        if len(levels) != 1:
            raise ValueError("unet: widths, blocks, attention and neighbor_attention differ in length")
        for width, attends in zip(self.widths, self._attends(), strict=True):
            if attends and width % self.head_width:
                raise ValueError(f"unet.head_width: {self.head_width} does not divide width {width}")
            if width % 4:
                raise ValueError(f"unet.widths: {width} is not divisible by 4 (2-D positions)")
        if self.patch < 1 or self.scale < 1 or self.patch % self.scale:
            raise ValueError(f"unet.patch: {self.patch} is not a multiple of scale {self.scale}")
        if self.placement and not (self.text_width and self.uses_neighbors):
            raise ValueError("unet.placement: needs a U-Net with text and neighbors")

    def _attends(self) -> tuple[bool, ...]:
        return tuple(a or n for a, n in zip(self.attention, self.neighbor_attention, strict=True))

    @property
    def uses_neighbors(self) -> bool:
        return any(self.neighbor_attention)

    @property
    def granularity(self) -> int:
        """Sides of pictures must be multiples of this."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> UNetConfig:
        """Inverse of `to_json`.

        Raises:
            ValueError: a name is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        if set(document) != known:
            raise ValueError(f"unet: config names {sorted(set(document) ^ known)} are unknown or missing")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**given)
