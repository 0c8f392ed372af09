"""Neighbors cut out and laid over the scene that a text names, and which of them a noisy picture shows.

A picture that repeats one of its neighbors is sharp; the mean of several is not. Which one x_t shows, pixel by pixel, has
a closed form: the posterior of a mixture of Gaussians around the laid neighbors, in windows (Kamb & Ganguli 2024, arXiv
2412.20292, section 3: the ideal denoiser of patches).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.diffusion.schedule import alpha_sigma
from common.unet.config import PREFERENCE_SIZE

NEAR_WHITE = 0.92  # pixels whose darkest color is above this may belong to a white ground
SWEEPS = 4  # rounds of rows and columns: a ground that winds more often than this stays in part


def cut_out(pictures: Tensor) -> Tensor:
    """Layers of pictures: what of each is not white ground around it.

    The ground is what is nearly white and reached from the border through nearly white pixels; at its edge a pixel is
    taken for a mixture of white with the strongest color beside it.

    Args:
        pictures: in [-1, 1] [..., 3, H, W].

    Returns:
        [..., 4, H, W]: color times opacity, and opacity in [0, 1]. Color + (1 - opacity) is the picture again.
    """
    flat = pictures.flatten(0, -4)
    darkness = (1.0 - flat).amax(1, keepdim=True) / 2.0  # [N, 1, H, W], how far from white
    ground = _reached_from_border(darkness < 1.0 - NEAR_WHITE)
    shown = darkness * ~ground
    edge = F.max_pool2d(ground.to(flat.dtype), 3, 1, 1) > 0
    opacity = torch.where(edge, (shown / F.max_pool2d(shown, 3, 1, 1).clamp(min=1e-3)).clamp(max=1.0), 1.0)
    opacity = opacity * ~ground
    return torch.cat([flat - (1.0 - opacity), opacity], 1).unflatten(0, pictures.shape[:-3])


def over_ground(layers: Tensor, color: Tensor) -> Tensor:
    """Layers [B, K, 4, H, W] over a color [B, 3] in [-1, 1]: [B, K, 3, H, W]."""
    return layers[:, :, :3] + (1.0 - layers[:, :, 3:]) * color[:, None, :, None, None]


def _reached_from_border(free: Tensor) -> Tensor:
    """Which cells of a boolean map [..., H, W] are joined to the border by free cells, by sweeps along rows and columns."""
    reached = torch.zeros_like(free)
    reached[..., 0, :], reached[..., -1, :], reached[..., :, 0], reached[..., :, -1] = (
        free[..., 0, :],
        free[..., -1, :],
        free[..., :, 0],
        free[..., :, -1],
    )
    # A run of free cells along a row or column is reached as a whole as soon as one of its cells is. The number of walls up
    # to a cell says which run it is in.
    runs = [(~free).cumsum(dim) for dim in (-1, -2)]
    joined, passable = reached.to(torch.int8), free.to(torch.int8)
    for _ in range(SWEEPS):
        for dim, run in zip((-1, -2), runs, strict=True):
            shape = list(free.shape)
            shape[dim] += 1
            of_runs = joined.new_zeros(shape).scatter_reduce_(dim, run, joined, "amax")
            joined = of_runs.gather(dim, run) * passable
    return joined.bool()


class Preference(nn.Module):
    """How well each neighbor suits a text (its style, say), from the two captions alone: a score for each.

    Heads weigh the tokens by one learned direction each, as in `Placement`.
    """

    def __init__(self, text_width: int, heads: int = 4, width: int = PREFERENCE_SIZE) -> None:
        super().__init__()
        self.asked = _Pooled(text_width, heads, width)
        self.offered = _Pooled(text_width, heads, width)
        self.width = width

    def score(self, asked: Tensor, offered: Tensor) -> Tensor:
        """[B, K] of what `self.asked` made of the text [B, width] and `self.offered` of the captions [B, K, width]."""
        return torch.einsum("bw,bkw->bk", asked, offered) / self.width**0.5


class _Pooled(nn.Module):
    def __init__(self, text_width: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(text_width, eps=1e-6)
        self.score = nn.Linear(text_width, heads, bias=False)
        self.to_out = nn.Linear(heads * text_width, width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        text = self.norm(text)
        scores = self.score(text).masked_fill(~mask[..., None], -1e4)
        pooled = torch.einsum("blh,blw->bhw", scores.softmax(1), text)
        return self.to_out(pooled.flatten(1)) * mask.any(1)[:, None].to(text.dtype)


class Posterior(nn.Module):
    """Which laid neighbor x_t shows, at each pixel.

    x0 is taken for a Gaussian around neighbor k, prior exp(score_k), of a variance that is learned: larger than that of
    a pixel, because pixels err together. What is compared is the whole picture and a window around each pixel.
    """

    WINDOW = 8  # the small window's side is about a picture's side by this
    BEGINNING = (20.0, 5.0)  # variances, of the whole picture and of the window

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(self.BEGINNING).log())

    def forward(self, x_t: Tensor, log_snr: Tensor, pictures: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """Logarithms of the neighbors' weights [B, K, H, W], which sum to one over those that are there.

        Args:
            x_t: [B, 3, H, W] at log-SNR [B].
            pictures: the laid neighbors in [-1, 1] [B, K, 3, H, W].
            scores: logarithms of their prior, up to a constant [B, K].
            mask: true where there is a neighbor [B, K].
        """
        alpha, sigma = (value[:, None, None, None] for value in alpha_sigma(log_snr))
        error = (x_t[:, None] - alpha[:, None] * pictures).square().sum(2)  # [B, K, H, W]
        side = 2 * (min(x_t.shape[2:]) // (2 * self.WINDOW)) + 1
        whole, near = sigma**2 + self.log_variance.exp()[:, None, None, None, None] * alpha**2
        evidence = error.sum((2, 3), keepdim=True) / whole + windowed(error, side) / near
        logits = scores[:, :, None, None] - evidence / 2.0
        return logits.masked_fill(~mask[:, :, None, None], -1e4).log_softmax(1)


def windowed(maps: Tensor, side: int) -> Tensor:
    """Sum of maps [B, K, H, W] over a square of odd `side` around each pixel; past the border, the mean goes on."""
    rows = F.avg_pool2d(maps, (side, 1), 1, (side // 2, 0), count_include_pad=False)
    return side**2 * F.avg_pool2d(rows, (1, side), 1, (0, side // 2), count_include_pad=False)
