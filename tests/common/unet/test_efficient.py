"""The Efficient U-Net (Imagen, appendix B) that a config makes: where it computes, and what it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.unet.layers import Attention, ResidualBlock
from common.unet.unet import UStack


def test_blocks_run_on_half_the_pictures_grid_or_less(efficient_config, make_unet, make_inputs, predict) -> None:
    """Down-sampling comes before a level's convolutions, up-sampling after them."""
    unet, seen = make_unet(efficient_config), []
    for module in unet.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda m, inputs, _: seen.append((inputs[0].shape[1], inputs[0].shape[2])))
    predict(unet, make_inputs(efficient_config, num_neighbors=0, side=32))
    assert seen == [(8, 16), (16, 8), (16, 8), (16, 8), (16, 8), (8, 16)], "(width, side), down and up again"


@pytest.mark.parametrize("skip_scale", [1.0, 2**-0.5])
def test_skips_are_scaled(efficient_config, skip_scale: float) -> None:
    config = replace(efficient_config, blocks=(0, 0, 0), skip_scale=skip_scale)
    ustack = UStack(config).double()
    features = [torch.randn(2, w, s, s, dtype=torch.float64) for w, s in zip(config.widths, (16, 8, 4), strict=True)]
    said = ustack(list(features), torch.zeros(2, config.embedding_width).double(), [], torch.zeros(2, 0).bool())
    x = features[2]
    for up, feature in zip(ustack.up, (features[1], features[0]), strict=True):
        x = (F.pixel_shuffle(up(x), 2) + feature) * skip_scale
    torch.testing.assert_close(said, x)


def test_super_resolution_reads_text_and_neighbors(efficient_config, make_unet, make_inputs, predict) -> None:
    unet, inputs = make_unet(efficient_config), make_inputs(efficient_config)
    said = predict(unet, inputs)
    assert not any(level.self_attention for stack in (unet.dstack, unet.ustack) for level in stack.levels)
    for name in ("text", "neighbors", "neighbor_text", "low_res"):
        assert not torch.allclose(predict(unet, inputs | {name: inputs[name] + 1.0}), said), name


def test_without_positions_a_crop_is_drawn_as_within_the_whole(
    efficient_config, make_unet, make_inputs, predict
) -> None:
    """What is trained on crops runs on whole pictures: the same text and neighbors, wherever the crop lies."""
    unet = make_unet(efficient_config)
    assert all(m.position is None for m in unet.modules() if isinstance(m, Attention))
    inputs = make_inputs(efficient_config, side=192)
    whole = predict(unet, inputs)
    crop = inputs | {"x_t": inputs["x_t"][..., 32:160, 32:160], "low_res": inputs["low_res"][..., 8:40, 8:40]}
    torch.testing.assert_close(predict(unet, crop)[..., 56:72, 56:72], whole[..., 88:104, 88:104], rtol=1e-4, atol=1e-5)


def test_an_input_finer_than_the_grid_is_enlarged_first(efficient_config, make_unet, make_inputs, predict) -> None:
    """The low-resolution input is read beside the picture's own pixels: one that changes one cell changes there."""
    unet, inputs = make_unet(efficient_config), make_inputs(efficient_config, num_neighbors=0, side=16)
    assert unet.low_res_stem.in_channels == 3
    seen: list[torch.Tensor] = []
    unet.low_res_stem.register_forward_hook(lambda m, given, _: seen.append(given[0]))
    predict(unet, inputs)
    wanted = F.interpolate(inputs["low_res"].float(), (16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(seen[0], wanted.double())
