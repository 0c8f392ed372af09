"""Convolutions with their weights laid out: what a plain one says, from a module that looks the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.unet.config import UNetConfig
from common.unet.packed import PackedConvolution, packed


def test_a_packed_unet_says_what_the_plain_one_says(any_config: UNetConfig, make_unet, make_inputs, predict) -> None:
    unet = make_unet(any_config, torch.float32).eval().requires_grad_(False)
    unet = unet.to(memory_format=torch.channels_last)
    inputs = make_inputs(any_config, dtype=torch.float32)
    expected, names = predict(unet, inputs), list(unet.state_dict())
    laid_out = packed(copy.deepcopy(unet))
    assert any(isinstance(module, PackedConvolution) for module in laid_out.modules())
    torch.testing.assert_close(predict(laid_out, inputs), expected, atol=1e-5, rtol=1e-5)
    assert sorted(laid_out.state_dict()) == sorted(names)
    assert laid_out.dtype == torch.float32 and laid_out.device == unet.device
    assert sum(p.numel() for p in laid_out.parameters()) == sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 8, 9, 7), (3, 8, 16, 16), (0, 8, 4, 4)])
def test_a_convolution_of_any_shape(shape: tuple[int, ...], stride: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride=stride, padding=1).requires_grad_(False)
    x = torch.randn(shape)
    laid_out = PackedConvolution(plain)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(laid_out(given), plain(given), atol=1e-5, rtol=1e-5)


def test_weights_that_are_loaded_or_moved_are_laid_out_anew() -> None:
    plain, other = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))
    laid_out, x = packed(copy.deepcopy(other)), torch.randn(2, 8, 6, 6)
    with torch.inference_mode():
        assert (laid_out(x) - plain(x)).abs().max() > 1e-2
    laid_out.load_state_dict(plain.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(laid_out(x), plain(x), atol=1e-5, rtol=1e-5)
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(laid_out.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_gradients_are_those_of_a_plain_one() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    laid_out, x = packed(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, requires_grad=True)
    (mine,), (theirs,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (laid_out, plain))
    torch.testing.assert_close(mine, theirs)
    for each in (laid_out, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(laid_out[0].weight.grad, plain[0].weight.grad)


def test_what_oneDNN_would_not_make_faster_stays() -> None:
    for kernel, dtype in ((1, torch.float32), (3, torch.bfloat16), (3, torch.float64)):
        module = nn.Sequential(nn.Conv2d(4, 4, kernel, dtype=dtype))
        assert isinstance(packed(module)[0], nn.Conv2d)
    with pytest.raises(ValueError, match="padding_mode: 'circular'"):
        PackedConvolution(nn.Conv2d(4, 4, 3, padding_mode="circular"))
