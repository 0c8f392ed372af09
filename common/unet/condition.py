"""What a trajectory is conditioned on, computed once and read by every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each [B, heads, N, head_width]."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The condition of B rows.

    Attributes:
        text: keys and values of the text, one entry for each text attention of the U-Net.
        text_mask: true where a token may be read [B, L].
        text_embedding: pooled text [B, embedding_width], zero where the text is dropped.
        placement: zoom and shift, each (row, column), at which the neighbors are read, and the color of the ground in
            [-1, 1], less white [B, PLACEMENT_SIZE], zero where the text is dropped: a pixel at p, in canvas units, looks
            at (1 + zoom) (p - 0.5) + 0.5 + shift.
        asked, offered: what the text asks of neighbors, zero where it is dropped, and what each offers, see `Preference`
            [B, P], [B, K, P]; P is 0 where the U-Net does not read the pictures.
        neighbors: keys and values of the neighbors' feature maps, one entry for each neighbor attention.
        neighbor_mask: true where a neighbor may be read [B, K].
        pictures: the neighbors themselves, cut out [B, K, 4, H, W], see `cut_out`, where the U-Net reads them; K is 0
            elsewhere.
        low_res: low-resolution input [B, 3, h, w]; its side is 0 where there is none.
        augmentation: log-SNR of the low-resolution input [B].
    """

    text: tuple[KeysValues, ...]
    text_mask: Tensor
    text_embedding: Tensor
    placement: Tensor
    asked: Tensor
    offered: Tensor
    neighbors: tuple[KeysValues, ...]
    neighbor_mask: Tensor
    pictures: Tensor
    low_res: Tensor
    augmentation: Tensor

    @property
    def num_rows(self) -> int:
        return self.text_mask.shape[0]

    def take(self, rows: Tensor) -> Condition:
        """The condition of these rows, in this order; a row may be taken many times."""
        return replace(self, **{f.name: _apply(lambda t: t[rows], getattr(self, f.name)) for f in fields(self)})

    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for f in fields(self) for t in _tensors(getattr(self, f.name)))


@dataclass(kw_only=True, eq=False)
class Newcomers:
    """Sets of neighbors whose feature maps are not there yet: a pass of the U-Net makes them beside its own rows.

    They wait as they came: behind the stem they would take more memory than their keys and values will.

    Attributes:
        pictures: in [-1, 1] [B, K, 3, H, W], K at least 1.
        text, text_mask: their captions' states [B, K, L, text_width]; true where there is a token [B, K, L].
        encoded: keys and values of the sets, as `Condition.neighbors` has them, once that pass is done.
    """

    pictures: Tensor
    text: Tensor
    text_mask: Tensor
    encoded: tuple[KeysValues, ...] | None = None

    @property
    def num_pictures(self) -> int:
        """Of all sets together."""
        return self.pictures.shape[0] * self.pictures.shape[1]


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Stack conditions along the batch; texts and neighbor sets of different lengths are padded with masked tokens."""
    length = max(c.text_mask.shape[1] for c in conditions)
    count = max(c.neighbor_mask.shape[1] for c in conditions)
    pictures = max(c.pictures.shape[1] for c in conditions)
    holder = next((c for c in conditions if c.neighbor_mask.shape[1] == count), conditions[0])
    sizes = [key.shape[2] // max(count, 1) for key, _ in holder.neighbors]  # tokens of one neighbor, by layer
    padded = [_pad(c, length, count, pictures, sizes) for c in conditions]
    first = padded[0]

    def stack(name: str) -> Tensor:
        return torch.cat([getattr(c, name) for c in padded])

    def stack_layers(name: str) -> tuple[KeysValues, ...]:
        layers = range(len(getattr(first, name)))
        return tuple(
            (torch.cat([getattr(c, name)[i][0] for c in padded]), torch.cat([getattr(c, name)[i][1] for c in padded]))
            for i in layers
        )

    return Condition(
        text=stack_layers("text"),
        text_mask=stack("text_mask"),
        text_embedding=stack("text_embedding"),
        placement=stack("placement"),
        asked=stack("asked"),
        offered=stack("offered"),
        neighbors=stack_layers("neighbors"),
        neighbor_mask=stack("neighbor_mask"),
        pictures=stack("pictures"),
        low_res=stack("low_res"),
        augmentation=stack("augmentation"),
    )


def _pad(condition: Condition, length: int, count: int, pictures: int, sizes: Sequence[int]) -> Condition:
    missing_text = length - condition.text_mask.shape[1]
    missing_neighbors = count - condition.neighbor_mask.shape[1]
    if not missing_text and not missing_neighbors:
        return condition
    neighbors = tuple(
        tuple(F.pad(t, (0, 0, 0, missing_neighbors * size)) for t in pair)
        for pair, size in zip(condition.neighbors, sizes, strict=True)
    )
    return replace(
        condition,
        text=tuple(tuple(F.pad(t, (0, 0, 0, missing_text)) for t in pair) for pair in condition.text),
        text_mask=F.pad(condition.text_mask, (0, missing_text)),
        neighbors=neighbors,
        neighbor_mask=F.pad(condition.neighbor_mask, (0, missing_neighbors)),
        offered=F.pad(condition.offered, (0, 0, 0, pictures - condition.pictures.shape[1])),
        pictures=F.pad(condition.pictures, (0, 0, 0, 0, 0, 0, 0, pictures - condition.pictures.shape[1])),
    )


def _apply(function, value):
    if isinstance(value, Tensor):
        return function(value)
    return tuple((function(key), function(values)) for key, values in value)


def _tensors(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for pair in value for t in pair]
