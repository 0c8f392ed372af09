"""Tiny U-Nets and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.unet.config import UNetConfig
from common.unet.unet import UNet

BASE = UNetConfig(
    patch=2,
    widths=(8, 16),
    blocks=(1, 2),
    attention=(False, True),
    text_attention=(False, True),
    neighbor_attention=(True, True),
    head_width=8,
    text_width=12,
    embedding_width=16,
    scale=1,
    skip_scale=1.0,
    positions=True,
    placement=True,
)
SUPER_RESOLUTION = replace(
    BASE,
    patch=4,
    attention=(False, False),
    text_attention=(False, False),
    neighbor_attention=(False, False),
    text_width=0,
    scale=4,
    placement=False,
)
SUPER_RESOLUTION_WITH_NEIGHBORS = replace(BASE, patch=4, scale=4, neighbor_attention=(False, True))

EFFICIENT = replace(
    BASE,
    patch=1,
    widths=(4, 8, 16),
    blocks=(0, 1, 2),
    attention=(False, False, False),
    text_attention=(False, False, True),
    neighbor_attention=(False, False, True),
    scale=4,
    skip_scale=2**-0.5,
    positions=False,
    placement=False,
)


@pytest.fixture
def base_config() -> UNetConfig:
    """A first stage: text, self-attention and neighbors."""
    return BASE


@pytest.fixture
def super_resolution_config() -> UNetConfig:
    """A super-resolution stage of convolutions alone."""
    return SUPER_RESOLUTION


@pytest.fixture
def efficient_config() -> UNetConfig:
    """A super-resolution stage as the paper's last: an Efficient U-Net with text and neighbors, no self-attention."""
    return EFFICIENT


@pytest.fixture(params=["base", "super-resolution", "super-resolution with neighbors", "efficient"])
def any_config(request: pytest.FixtureRequest) -> UNetConfig:
    """Each kind of stage in turn."""
    return {
        "base": BASE,
        "super-resolution": SUPER_RESOLUTION,
        "super-resolution with neighbors": SUPER_RESOLUTION_WITH_NEIGHBORS,
        "efficient": EFFICIENT,
    }[request.param]


@pytest.fixture
def make_unet() -> Callable[..., UNet]:
    """Makes a U-Net whose every weight matters: what starts at zero is moved away from it."""

    def make(config: UNetConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> UNet:
        torch.manual_seed(seed)
        unet = UNet(config).to(dtype)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return unet

    return make


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Any]]:
    """Makes arguments of `UNet.condition` with `x_t` and `log_snr` for `denoise`."""

    def make(
        config: UNetConfig,
        batch: int = 2,
        num_neighbors: int = 3,
        num_tokens: int = 5,
        side: int = 16,
        dtype: torch.dtype = torch.float64,
        seed: int = 1,
    ) -> dict[str, Any]:
        source = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

        text_mask = torch.ones(batch, num_tokens, dtype=torch.bool)
        text_mask[-1, -1:] = False  # the rows' texts differ in length
        inputs: dict[str, Any] = {
            "text": draw(batch, num_tokens, config.text_width),
            "text_mask": text_mask,
            "neighbors": draw(batch, num_neighbors, 3, side, side),
            "neighbor_text": draw(batch, num_neighbors, 4, config.text_width),
            "neighbor_text_mask": torch.ones(batch, num_neighbors, 4, dtype=torch.bool),
            "neighbor_mask": torch.ones(batch, num_neighbors, dtype=torch.bool),
        }
        if config.scale > 1:
            inputs["low_res"] = draw(batch, 3, side // config.scale, side // config.scale)
            inputs["augmentation"] = torch.linspace(2.0, 9.0, batch, dtype=dtype)
        return inputs | {
            "x_t": draw(batch, 3, side, side),
            "log_snr": torch.linspace(-4.0, 5.0, batch, dtype=dtype),
        }

    return make


@pytest.fixture
def predict() -> Callable[[UNet, dict[str, Any]], Tensor]:
    """Condition and denoise at once."""

    def run(unet: UNet, inputs: dict[str, Any]) -> Tensor:
        given = {name: value for name, value in inputs.items() if name not in ("x_t", "log_snr")}
        return unet.denoise(inputs["x_t"], inputs["log_snr"], unet.condition(**given))

    return run
