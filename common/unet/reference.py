"""Neighbors as pictures: where the text puts them, what they show there, and what is taken over as it stands.

Attention finds things that are elsewhere; these are the straight ways for those that are at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.unet.config import PLACEMENT_SIZE


@dataclass(frozen=True, kw_only=True)
class Laid:
    """K neighbors laid where the text places them.

    Attributes:
        pictures: [B, K, 3, H, W] in [-1, 1].
        features: what two convolutions read of them [B, K, width, H / patch, W / patch].
        mask: true where there is a neighbor [B, K].
    """

    pictures: Tensor
    features: Tensor
    mask: Tensor


class Reference(nn.Module):
    """What the neighbors show at each place of the picture, pixel by pixel: the way by which shapes are taken over.

    Each neighbor is laid where the text places it, read by two convolutions, and the neighbors are pooled (Deep Sets,
    Zaheer et al. 2017: any number, in any order). Pooling begins by adding nothing.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(3 * patch * patch, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.to_out = nn.Conv2d(2 * width, width, 1, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def lay(self, pictures: Tensor, mask: Tensor, placement: Tensor, size: tuple[int, int]) -> Laid:
        """Read the neighbors for a picture of `size` (H, W); mask [B, K], placement [B, 4]."""
        placed = place_pictures(pictures, placement, size)
        folded = F.pixel_unshuffle(placed.flatten(0, 1), self.patch).contiguous(memory_format=torch.channels_last)
        read = F.silu(self.conv_out(F.silu(self.conv_in(folded))))
        return Laid(pictures=placed, features=read.unflatten(0, mask.shape), mask=mask)

    def forward(self, laid: Laid) -> Tensor:
        """The pooled features [B, width, H / patch, W / patch]."""
        read, mask = laid.features, laid.mask
        there = mask[:, :, None, None, None]
        mean = (read * there).sum(1) / mask.sum(1).clamp(min=1)[:, None, None, None]
        most = read.masked_fill(~there, -1.0).amax(1) * mask.any(1)[:, None, None, None]  # SiLU is above -0.3
        return self.to_out(torch.cat([mean, most], 1))


class Copy(nn.Module):
    """Takes pixels over from the neighbors: each pixel is a mixture of the drawn one and the neighbors' own.

    The copy mechanism of sequence models (pointer networks, Vinyals et al. 2015; See et al. 2017) for pictures: the share
    of each neighbor is scored from what the U-Net has drawn and from what the neighbor shows there, so that any number,
    in any order, may be given. It is meant for a U-Net that predicts x0, and begins with hardly any copying.
    """

    BEGINNING = -4.0  # logit of a neighbor against the drawn pixel's 0
    SHARPNESS = 8.0  # a step of Adam moves a weight by the learning rate: unscaled, scores would follow slowly

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.read = nn.Conv2d(2 * width, width, 1)
        self.score = nn.Conv2d(width, patch * patch, 1)
        nn.init.zeros_(self.score.weight)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, self.BEGINNING / self.SHARPNESS)

    def shares(self, hidden: Tensor, laid: Laid) -> Tensor:
        """Share of the drawn pixel (first) and of each neighbor's [B, 1 + K, 1, H, W], summing to one.

        `hidden` [B, width, H / patch, W / patch]: the features that the picture is drawn from.
        """
        batch, count = laid.mask.shape
        pairs = torch.cat([hidden[:, None].expand(-1, count, -1, -1, -1), laid.features], 2).flatten(0, 1)
        scores = self.SHARPNESS * self.score(F.silu(self.read(pairs.contiguous(memory_format=torch.channels_last))))
        scores = F.pixel_shuffle(scores, self.patch).unflatten(0, (batch, count))
        scores = scores.masked_fill(~laid.mask[:, :, None, None, None], float("-inf"))
        return F.pad(scores, (0, 0, 0, 0, 0, 0, 1, 0)).softmax(1)

    def forward(self, drawn: Tensor, hidden: Tensor, laid: Laid) -> Tensor:
        """The picture [B, 3, H, W] with what is taken over."""
        return (self.shares(hidden, laid) * torch.cat([drawn[:, None], laid.pictures], 1)).sum(1)


def place_pictures(pictures: Tensor, placement: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [B, K, 3, h, w] in [-1, 1] read at the places that `placement` [B, 4] says, white outside of them.

    Returns:
        [B, K, 3, H, W] for `size` (H, W).
    """
    batch, count = pictures.shape[:2]
    zoom, shift = placement.chunk(2, -1)  # [B, 2] each, (row, column)
    rows, across = (1 + zoom), 2 * shift  # in the sampler's units the canvas is [-1, 1]
    nothing = torch.zeros_like(rows[:, 0])
    affine = torch.stack(
        [
            torch.stack([rows[:, 1], nothing, across[:, 1]], -1),
            torch.stack([nothing, rows[:, 0], across[:, 0]], -1),
        ],
        1,
    )
    grid = F.affine_grid(affine, [batch, 3, *size], align_corners=False).to(pictures.dtype)
    # What lies outside is zero for the sampler: the pictures are moved so that this is white.
    read = F.grid_sample(pictures.flatten(1, 2) - 1.0, grid, padding_mode="zeros", align_corners=False) + 1.0
    return read.unflatten(1, (count, 3))


class Placement(nn.Module):
    """Reads from a text where it puts the entity: zoom and shift, each (row, column) [B, 4].

    Spatial transformers (Jaderberg et al. 2015) for the places at which neighbors are read: an entity asked for small in
    a corner is looked up at its own, whole size. Each head weighs the tokens by one learned direction, since a mean of
    all tokens hardly tells "top left" from "bottom right". It begins by moving nothing.
    """

    def __init__(self, text_width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text_width, eps=1e-6)
        self.score = nn.Linear(text_width, heads, bias=False)
        self.to_out = nn.Linear(heads * text_width, PLACEMENT_SIZE)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """text [B, L, text_width], mask [B, L] true where there is a token; rows without any give zeros."""
        text = self.norm(text)
        scores = self.score(text).masked_fill(~mask[..., None], -1e4)
        pooled = torch.einsum("blh,blw->bhw", scores.softmax(1), text)
        return self.to_out(pooled.flatten(1)) * mask.any(1)[:, None].to(text.dtype)
