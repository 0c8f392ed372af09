"""Whether weights as they are published still say what the trained ones say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.checkpoint import CheckpointError
from common.unet.condition import Condition
from common.unet.config import UNetConfig
from common.unet.unet import UNet

LIMITS = {torch.float16: 0.005, torch.bfloat16: 0.04}
"""Largest accepted `rounding_error`: about eight times what the demonstration's networks have."""

_LOG_SNRS = (-6.0, -2.0, 2.0, 6.0)  # nearly noise to nearly clean
_NEIGHBORS, _TOKENS = 2, 8


def check_parity(config: UNetConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """`rounding_error`, where it is small enough to be published.

    Raises:
        CheckpointError: it is not.
    """
    error = rounding_error(config, weights, dtype)
    if not error <= LIMITS[dtype]:
        raise CheckpointError(
            f"weights: rounded to {str(dtype).removeprefix('torch.')} they predict something else: a relative error of"
            f" {error:.3g}, {LIMITS[dtype]} is accepted; nothing is published"
        )
    return error


@torch.inference_mode()
def rounding_error(config: UNetConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """Root mean square of the difference between predictions with rounded and unrounded weights, over that of the
    predictions: at several noise levels, on the same random inputs, with text and neighbors where the network reads them."""
    side = 4 * config.granularity
    draw = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(_LOG_SNRS), 3, side, side, generator=draw)
    log_snr = torch.tensor(_LOG_SNRS)
    said: list[Tensor] = []
    for rounded in (False, True):
        unet = UNet(config)
        unet.load_state_dict(
            {n: w.detach().cpu().to(dtype if rounded else w.dtype).float() for n, w in weights.items()}
        )
        said.append(unet.eval()(x_t, log_snr, _condition(unet, len(x_t), side)))
    exact, published = said
    return float((published - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _condition(unet: UNet, batch: int, side: int) -> Condition:
    config, draw = unet.config, torch.Generator().manual_seed(1)
    count = _NEIGHBORS if config.uses_neighbors else 0
    low = side // config.scale
    return unet.condition(
        text=torch.randn(batch, _TOKENS, config.text_width, generator=draw),
        text_mask=torch.ones(batch, _TOKENS, dtype=torch.bool),
        neighbors=torch.rand(batch, count, 3, side, side, generator=draw) * 2 - 1,
        neighbor_text=torch.randn(batch, count, _TOKENS, config.text_width, generator=draw),
        neighbor_text_mask=torch.ones(batch, count, _TOKENS, dtype=torch.bool),
        neighbor_mask=torch.ones(batch, count, dtype=torch.bool),
        low_res=torch.rand(batch, 3, low, low, generator=draw) * 2 - 1 if config.scale > 1 else None,
        augmentation=torch.full((batch,), 4.0) if config.scale > 1 else None,
    )
