"""Neighbors as pictures: where the text puts them, what they show there, and what is taken over as it stands.

Attention finds things that are elsewhere; these are the straight ways for those that are at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.unet.collage import over_ground
from common.unet.config import LAYER_CHANNELS, PLACEMENT_SIZE


@dataclass(frozen=True, kw_only=True)
class Laid:
    """K neighbors laid where the text places them.

    Attributes:
        pictures: over the color that the text names [B, K, 3, H, W], in [-1, 1].
        layers: the same, cut out, see `cut_out` [B, K, 4, H, W].
        features: what two convolutions read of them [B, K, width, H / patch, W / patch].
        mask: true where there is a neighbor [B, K].
    """

    pictures: Tensor
    layers: Tensor
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
        self.conv_in = nn.Conv2d(LAYER_CHANNELS * patch * patch, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.to_out = nn.Conv2d(2 * width, width, 1, bias=False)
        self.guess = nn.Conv2d(LAYER_CHANNELS * patch * patch, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.guess.weight)

    def lay(self, layers: Tensor, mask: Tensor, placement: Tensor, size: tuple[int, int]) -> Laid:
        """Read the neighbors, cut out, for a picture of `size` (H, W); mask [B, K], placement [B, PLACEMENT_SIZE]."""
        placed = place_layers(layers, placement, size)
        color = placement[:, 4:] + 1.0
        # Read over white, as neighbors come; where they are opaque is told beside it.
        seen = torch.cat([over_ground(placed, torch.ones_like(color)), placed[:, :, 3:]], 2)
        read = F.silu(self.conv_out(F.silu(self.conv_in(self._fold(seen.flatten(0, 1))))))
        return Laid(
            pictures=over_ground(placed, color), layers=placed, features=read.unflatten(0, mask.shape), mask=mask
        )

    def forward(self, laid: Laid, log_weights: Tensor) -> Tensor:
        """The pooled features, and the neighbors mixed by their weights [B, K, H, W]: [B, width, H / patch, W / patch]."""
        read, mask = laid.features, laid.mask
        there = mask[:, :, None, None, None]
        mean = (read * there).sum(1) / mask.sum(1).clamp(min=1)[:, None, None, None]
        most = read.masked_fill(~there, -1.0).amax(1) * mask.any(1)[:, None, None, None]  # SiLU is above -0.3
        shown = torch.cat([laid.pictures, laid.layers[:, :, 3:]], 2)
        guess = (log_weights.exp()[:, :, None] * shown * there).sum(1)
        return self.to_out(torch.cat([mean, most], 1)) + self.guess(self._fold(guess))

    def _fold(self, pictures: Tensor) -> Tensor:
        return F.pixel_unshuffle(pictures, self.patch).contiguous(memory_format=torch.channels_last)


class Copy(nn.Module):
    """Takes pixels over from the neighbors: each pixel is a mixture of the drawn one and the neighbors' own.

    The copy mechanism of sequence models (pointer networks, Vinyals et al. 2015; See et al. 2017) for pictures: the share
    of each neighbor is scored from what the U-Net has drawn and from what the neighbor shows there, so that any number,
    in any order, may be given. It is meant for a U-Net that predicts x0, and begins with hardly any copying.

    The best guess of what x_t does not show yet is a blur, and the steps after it keep to what the first ones show. So
    sampling is bold: the noisier x_t, the more is taken over, in the way of a low temperature.
    """

    BEGINNING = -4.0  # logit of a neighbor against the drawn pixel's 0
    SHARPNESS = 8.0  # a step of Adam moves a weight by the learning rate: unscaled, scores would follow slowly

    def __init__(self, width: int, patch: int, boldness: float = 0.0) -> None:
        super().__init__()
        self.patch, self.boldness = patch, boldness
        self.read = nn.Conv2d(2 * width, width, 1)
        self.score = nn.Conv2d(width, patch * patch, 1)
        nn.init.zeros_(self.score.weight)
        assert self.score.bias is not None
        nn.init.constant_(self.score.bias, self.BEGINNING / self.SHARPNESS)

    LITTLE, MUCH = 2.0, 6.0  # log-SNR up to which sampling is bold in full, and from which on not at all

    def shares(self, hidden: Tensor, laid: Laid, log_weights: Tensor, log_snr: Tensor | None) -> Tensor:
        """Share of the drawn pixel (first) and of each neighbor's [B, 1 + K, 1, H, W], summing to one.

        Args:
            hidden: the features that the picture is drawn from [B, width, H / patch, W / patch].
            log_weights: of the neighbors against one another [B, K, H, W].
            log_snr: of x_t [B], None: not bold.
        """
        batch, count = laid.mask.shape
        pairs = torch.cat([hidden[:, None].expand(-1, count, -1, -1, -1), laid.features], 2).flatten(0, 1)
        scores = self.SHARPNESS * self.score(F.silu(self.read(pairs.contiguous(memory_format=torch.channels_last))))
        scores = F.pixel_shuffle(scores, self.patch).unflatten(0, (batch, count)) + log_weights[:, :, None]
        if log_snr is not None:
            noisy = ((self.MUCH - log_snr) / (self.MUCH - self.LITTLE)).clamp(0.0, 1.0)
            scores = scores + self.boldness * noisy.to(scores.dtype)[:, None, None, None, None]
        scores = scores.masked_fill(~laid.mask[:, :, None, None, None], float("-inf"))
        return F.pad(scores, (0, 0, 0, 0, 0, 0, 1, 0)).softmax(1)

    def forward(self, drawn: Tensor, hidden: Tensor, laid: Laid, log_weights: Tensor, log_snr: Tensor | None) -> Tensor:
        """The picture [B, 3, H, W] with what is taken over; see `shares`."""
        return (self.shares(hidden, laid, log_weights, log_snr) * torch.cat([drawn[:, None], laid.pictures], 1)).sum(1)


def place_layers(layers: Tensor, placement: Tensor, size: tuple[int, int]) -> Tensor:
    """Layers [B, K, 4, h, w] read at the places that `placement` [B, PLACEMENT_SIZE] says, nothing outside of them.

    Returns:
        [B, K, 4, H, W] for `size` (H, W).
    """
    batch, count = layers.shape[:2]
    zoom, shift = placement[:, :2], placement[:, 2:4]  # (row, column)
    rows, across = (1 + zoom), 2 * shift  # in the sampler's units the canvas is [-1, 1]
    nothing = torch.zeros_like(rows[:, 0])
    affine = torch.stack(
        [
            torch.stack([rows[:, 1], nothing, across[:, 1]], -1),
            torch.stack([nothing, rows[:, 0], across[:, 0]], -1),
        ],
        1,
    )
    grid = F.affine_grid(affine, [batch, LAYER_CHANNELS, *size], align_corners=False).to(layers.dtype)
    read = F.grid_sample(layers.flatten(1, 2), grid, padding_mode="zeros", align_corners=False)
    return read.unflatten(1, (count, LAYER_CHANNELS))


class Placement(nn.Module):
    """Reads from a text where it puts the entity, and on what color [B, PLACEMENT_SIZE].

    Zoom and shift, each (row, column); then the color, less white.

    Spatial transformers (Jaderberg et al. 2015) for the places at which neighbors are read: an entity asked for small in
    a corner is looked up at its own, whole size. Each head weighs the tokens by one learned direction, since a mean of
    all tokens hardly tells "top left" from "bottom right". It begins by moving nothing, on white.
    """

    def __init__(self, text_width: int, heads: int = 8) -> None:
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
