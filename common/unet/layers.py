"""The U-Net's parts: normalisation, residual block, attention with 2-D positions."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel (Ba et al. 2016), without a shift; x [B, C, H, W].

    It never looks across pixels, so a crop is normalised as the whole picture is. In channels-last memory the
    permutation is free and the fused kernel runs; it sums in float32 whatever the input's type, so that autocast, which
    would make and keep float32 copies of both sides, is turned off.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            gain = self.gain.to(x.dtype)
            return F.layer_norm(x.permute(0, 2, 3, 1), gain.shape, gain, None, 1e-6).permute(0, 3, 1, 2)


class TokenNorm(nn.RMSNorm):
    """Root-mean-square normalisation of tokens [..., width] (Zhang & Sennrich 2019), in their own type as `ChannelNorm`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class NoiseEmbedding(nn.Module):
    """log-SNR [B] -> embedding [B, width]: sinusoidal features, then an MLP."""

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 32) -> None:
        super().__init__()
        # Periods from 0.25 to 64 in units of log-SNR, whose range is [-12, 12].
        frequencies = 2 * math.pi / torch.logspace(-2, 6, num_frequencies, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_snr: Tensor) -> Tensor:
        angles = log_snr[:, None].float() * self.frequencies
        features = torch.cat([angles.sin(), angles.cos()], -1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the noise embedding scaling and shifting between them; [B, width, H, W] -> the same."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.norm_in = ChannelNorm(width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(embedding_width, 2 * width)
        self.norm_out = ChannelNorm(width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)
        nn.init.normal_(self.conv_out.weight, std=1e-3)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # Whatever is made here is written over where no gradient asks for it: at large sides new memory costs more than sums.
        # A compiler does so by itself, and breaks its graph where it is told to.
        eager = not torch.compiler.is_compiling()
        reuses = eager and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        h = self.conv_in(F.silu(self.norm_in(x), inplace=reuses))
        scale, shift = self.modulate(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h)
        h = F.silu(torch.addcmul(shift, h, 1 + scale, out=h if reuses else None), inplace=reuses)
        h = self.conv_out(h)
        return h.add_(x) if reuses else x + h


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached tensor made in inference mode could not be used in training later
def grid_places(height: int, width: int, device: torch.device) -> Tensor:
    """Places of a grid's cells [height * width, 2], (row, column); kept on the device, since a copy would be waited for.

    In canvas units (0 to 1), not in cells, so that a place means the same at every resolution.
    """
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack([rows[:, None].expand(-1, width), columns[None].expand(height, -1)], -1).reshape(-1, 2)


def encode_places(places: Tensor, channels: int) -> Tensor:
    """2-D sinusoidal positions [..., channels] of places [..., 2]."""
    frequencies = torch.logspace(0, 4, channels // 4, base=2.0, device=places.device) * math.pi
    angles = places[..., None] * frequencies  # [..., 2, channels / 4]
    return torch.stack([angles.sin(), angles.cos()], -2).flatten(-3)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def grid_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sinusoidal positions of a grid's cells [height * width, channels]."""
    return encode_places(grid_places(height, width, device), channels)


class Attention(nn.Module):
    """Multi-head attention of a feature map's pixels to a set of tokens, with per-head normalised queries and keys.

    A learned null token is always among the keys: with every other token masked, or none given, it is all there is,
    which makes "no tokens" and "all masked" the same condition.
    """

    def __init__(self, width: int, source_width: int, head_width: int, *, positions: bool, sharpness: float) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm = ChannelNorm(width)
        self.source_norm = TokenNorm(source_width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(source_width, width, bias=False)
        self.to_value = nn.Linear(source_width, width, bias=False)
        self.null_key = nn.Parameter(torch.randn(width) * 0.02)
        self.null_value = nn.Parameter(torch.zeros(width))
        self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), math.log(sharpness)))
        self.to_out = nn.Linear(width, width)
        self.position = nn.Linear(width, width, bias=False) if positions else None
        if self.position is not None:
            # Each head starts out seeing part of the frequencies as they are: near places attend to each other.
            nn.init.eye_(self.position.weight)
        nn.init.normal_(self.to_out.weight, std=0.02)
        nn.init.zeros_(self.to_out.bias)

    def keys_values(self, source: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, N, head_width] of tokens [B, N, source_width].

        `grid` is the (height, width) of the feature map that the tokens are, repeated if there are several maps.
        """
        source = self.source_norm(source)
        key, value = self.to_key(source), self.to_value(source)
        if self.position is not None and grid is not None and source.shape[1]:
            positions = self._positions(grid, source)
            key = key + positions.repeat(source.shape[1] // positions.shape[0], 1)
        return self._unit(self._split(key)), self._split(value)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, places: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W] plus what it reads from keys and values.

        Args:
            mask: true where a token may be read [B, N].
            places: where each pixel looks [B, H * W, 2], in canvas units; None: at its own place.
        """
        batch, width, height, columns = x.shape
        if not key.shape[2]:  # the null token alone is read, wherever a pixel looks
            return x + self.to_out(self.null_value)[:, None, None]
        query = self.to_query(self.norm(x).flatten(2).transpose(1, 2))
        if self.position is not None:
            if places is None:
                query = query + self._positions((height, columns), query)
            else:
                query = query + self.position(encode_places(places, width).to(query.dtype))
        query = self._unit(self._split(query))
        query = query * self.temperature.exp().to(query.dtype)
        null_key = self._unit(self._split(self.null_key.expand(batch, 1, width)))
        null_value = self._split(self.null_value.expand(batch, 1, width))
        key, value = torch.cat([null_key, key], 2), torch.cat([null_value, value], 2)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        read = self.to_out(read.transpose(1, 2).reshape(batch, height * columns, width))
        return x + read.transpose(1, 2).reshape(batch, width, height, columns)

    def _positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        assert self.position is not None
        return self.position(grid_positions(*grid, self.position.in_features, like.device).to(like.dtype))

    def _split(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)

    @staticmethod
    def _unit(heads: Tensor) -> Tensor:
        with torch.autocast(heads.device.type, enabled=False):  # as for ChannelNorm
            return F.normalize(heads, dim=-1)
