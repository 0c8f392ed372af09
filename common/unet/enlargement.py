"""What a super-resolution U-Net keeps of the picture that it enlarges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.diffusion.schedule import alpha_sigma

BEGINNING = 0.015  # standard deviation of what squares of a drawn picture err by, [-1, 1]


def enlarge(pictures: Tensor, like: Tensor) -> Tensor:
    """Pictures [B, 3, h, w] at the size of `like` [B, 3, H, W], float32."""
    return F.interpolate(pictures.float(), (like.shape[2], like.shape[3]), mode="bicubic", align_corners=False)


class Consistency(nn.Module):
    """Gives the squares of a drawn picture the means that the low-resolution picture has.

    Shrinking is a mean over squares, so that what it keeps is known, and the network need say only what it loses: the range
    and null space of DDNM (Wang, Yu & Zhang 2023, arXiv 2212.00490, equation 10). Where the low-resolution picture is noised,
    each mean is that of two Gaussians, what was drawn, of a variance that is learned, and what was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(BEGINNING**2).log())

    def forward(self, drawn: Tensor, low_res: Tensor, augmentation: Tensor) -> Tensor:
        """[B, 3, H, W] as `drawn`.

        Args:
            drawn: x0 as it is said [B, 3, H, W].
            low_res: noised to the log-SNR `augmentation` [B]; [B, 3, h, w], h and w dividing H and W.
        """
        alpha, sigma = (value[:, None, None, None].float() for value in alpha_sigma(augmentation))
        square = (drawn.shape[2] // low_res.shape[2], drawn.shape[3] // low_res.shape[3])
        given = self.log_variance.float().exp() * alpha**2
        missing = low_res.float() / alpha - F.avg_pool2d(drawn.float(), square)
        return drawn + F.interpolate(given / (given + sigma**2) * missing, scale_factor=square).to(drawn.dtype)
