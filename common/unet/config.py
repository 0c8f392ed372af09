"""Architecture of a U-Net as data. It travels with the weights; three stages differ by these values alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

PLACEMENT_SIZE = 7  # zoom and shift, each (row, column); the color of the ground, less white
PREFERENCE_SIZE = 32  # of what a text asks of neighbors, and of what each offers
LAYER_CHANNELS = 4  # of a neighbor that is cut out: color times opacity, opacity
LATER = {"text_attention", "skip_scale", "positions"}  # names that came after the first published weights, all at once


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """One U-Net. Level i works on a grid of size / (patch * 2^i).

    Attributes:
        patch: side of the pixel squares folded into channels by the stem (pixel unshuffle).
        widths: channels of each level.
        blocks: residual blocks of each level, in the DStack and again in the UStack. Levels down-sample before their blocks
            and up-sample after them, so a first level of none is the Efficient U-Net's (Imagen, appendix B): a stem of the
            whole picture's grid, everything else on half of it or less.
        attention: per level, whether its blocks attend to themselves.
        text_attention: per level, whether its blocks attend to the text.
        neighbor_attention: per level, whether its feature map attends to the neighbors'.
        head_width: channels of an attention head.
        text_width: width of the text encoder's token states; 0 for a U-Net without text.
        embedding_width: width of the noise-level embedding.
        scale: how many times larger than its low-resolution input; 1 for a U-Net without one. The input is read on its own
            grid where `patch` is a multiple of `scale`, and enlarged first where it is not.
        skip_scale: of the sum of a level's own features and what comes up from below: 2^-0.5 keeps the variance
            (Imagen, appendix B).
        positions: whether self-attention and neighbor attention know places; not where crops are trained on, whose places
            are not those of whole pictures.
        placement: whether the text says where the neighbors are read ("small in the top left corner"), and they are laid
            there, pixel by pixel, beside what attention finds.
        consistent: whether a super-resolution U-Net, which must say x0, keeps the colors of its input, see `Consistency`.
        boldness: logit that is added for neighbors' pixels in sampling while x_t shows little, see `Copy`.
    """

    patch: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    attention: tuple[bool, ...]
    text_attention: tuple[bool, ...]
    neighbor_attention: tuple[bool, ...]
    head_width: int
    text_width: int
    embedding_width: int
    scale: int
    skip_scale: float
    positions: bool
    placement: bool
    boldness: float = 0.0
    consistent: bool = False

    def __post_init__(self) -> None:
        by_level = (self.widths, self.blocks, self.attention, self.text_attention, self.neighbor_attention)
        if len({len(values) for values in by_level}) != 1:
            raise ValueError("unet: widths, blocks, attention, text_attention and neighbor_attention differ in length")
        for width, attends in zip(self.widths, self._attends(), strict=True):
            if attends and width % self.head_width:
                raise ValueError(f"unet.head_width: {self.head_width} does not divide width {width}")
            if width % 4:
                raise ValueError(f"unet.widths: {width} is not divisible by 4 (2-D positions)")
        if self.patch < 1 or self.scale < 1 or (self.patch % self.scale and self.scale % self.patch):
            raise ValueError(f"unet.patch: {self.patch} and scale {self.scale}: neither is a multiple of the other")
        if any(self.text_attention) and not self.text_width:
            raise ValueError("unet.text_attention: needs a U-Net with text")
        if not 0.0 < self.skip_scale <= 1.0:
            raise ValueError(f"unet.skip_scale: {self.skip_scale} is not in (0, 1]")
        if self.placement and not (self.text_width and self.uses_neighbors):
            raise ValueError("unet.placement: needs a U-Net with text and neighbors")
        if self.boldness < 0.0 or (self.boldness and not self.placement):
            raise ValueError(f"unet.boldness: {self.boldness} is negative, or nothing is laid that could be taken over")
        if self.consistent and self.scale == 1:
            raise ValueError("unet.consistent: needs a U-Net with a low-resolution input")

    def _attends(self) -> tuple[bool, ...]:
        reads = zip(self.attention, self.text_attention, self.neighbor_attention, strict=True)
        return tuple(any(level) for level in reads)

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
        """Inverse of `to_json`; also reads documents of before some names were there.

        Raises:
            ValueError: a name is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        document = {"boldness": 0.0, "consistent": False} | document
        if set(document) == known - LATER:
            text = tuple(bool(a and document["text_width"]) for a in document["attention"])
            document = document | {"text_attention": text, "skip_scale": 1.0, "positions": True}
        if set(document) != known:
            raise ValueError(f"unet: config names {sorted(set(document) ^ known)} are unknown or missing")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return cls(**given)
