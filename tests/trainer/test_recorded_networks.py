"""The demonstration's networks draw what they drew: outputs recorded, of super-resolution before it learned to read text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.unet.config import UNetConfig
from common.unet.unet import UNet
from trainer.presets import preset

RECORDED = {
    "demo-64": (227, [-0.34009, 1.303206, 1.117079, 1.311972, 1.106419], 0.624999),
    "demo-256": (82, [-1.353923, 0.998312, 0.48106, 0.075461, 0.928137], 0.662173),
    "demo-1024": (102, [1.048878, 2.707357, 2.682831, 2.180647, 0.531077], 2.42346),
    "tiny-64": (133, [0.637565, -1.055835, 0.136493, -0.857874, 0.863386], 0.932770),
}
"""Tensors of the state, pixels of the output, its standard deviation."""


def waves(shape: tuple[int, ...], phase: float) -> Tensor:
    """Values that no random generator has a say in."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37 + phase).reshape(shape).float()


def network(config: UNetConfig) -> UNet:
    unet = UNet(config).requires_grad_(False)
    for i, (name, parameter) in enumerate(sorted(unet.named_parameters())):
        scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_(waves(tuple(parameter.shape), i) * scale + (1.0 if name.endswith("gain") else 0.0))
    return unet


def drawn(unet: UNet) -> Tensor:
    side, width, scale = 32, unet.config.text_width, unet.config.scale
    count = 2 if unet.config.uses_neighbors else 0
    condition = unet.condition(
        text=waves((2, 5, width), 1),
        text_mask=torch.tensor([[True, True, True, False, False], [True] * 5]),
        neighbors=waves((2, count, 3, side, side), 2),
        neighbor_text=waves((2, count, 4, width), 3),
        neighbor_text_mask=torch.ones(2, count, 4, dtype=torch.bool),
        neighbor_mask=torch.tensor([[True, False], [True, True]])[:, :count],
        low_res=waves((2, 3, side // 4, side // 4), 4) if scale > 1 else None,
        augmentation=torch.tensor([3.0, -1.0]) if scale > 1 else None,
    )
    return unet(waves((2, 3, side, side), 5), torch.tensor([2.0, -4.0]), condition)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_networks_draw_what_they_drew(name: str) -> None:
    # What `Consistency` changes of it has a closed form of its own: test_enlargement.py.
    unet = network(replace(preset(name).unet, consistent=False))
    tensors, pixels, deviation = RECORDED[name]
    output = drawn(unet)
    assert len(unet.state_dict()) == tensors
    torch.testing.assert_close(output.flatten()[::1471][:5], torch.tensor(pixels), atol=2e-5, rtol=0)
    assert float(output.double().std()) == pytest.approx(deviation, abs=1e-5)
