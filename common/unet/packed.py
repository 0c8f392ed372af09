"""Convolutions whose weights lie in memory as oneDNN's kernels read them, for passes on a CPU.

PyTorch hands oneDNN a convolution's weights as they lie, and oneDNN lays them out anew at every pass: at one or two rows,
a third of the time of a convolution with 256 channels. Here it is done once. The operators are those that torch.compile
puts in place of convolutions (torch/_inductor/fx_passes/mkldnn_fusion.py, torch 2.13).
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_PLAIN = ("none", [], "")  # no operation on the result: its name, its numbers, its algorithm


def packed(module: M) -> M:
    """The module, changed in place: its convolutions have their weights a second time, laid out.

    It stays on its device and in its type from here on, and its weights are not to be changed: nobody would lay them out
    again. Where weights are not float32 on a CPU, or PyTorch has no oneDNN, nothing is changed. Convolutions of single
    pixels stay, too: some are slower by far with weights laid out.
    """
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        _pack(module)
    return module


@torch.no_grad()
def _pack(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Conv2d):
            _pack(child)
        elif child.kernel_size != (1, 1) and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
            setattr(module, name, PackedConvolution(child))


class PackedConvolution(nn.Module):
    """Does what a convolution does; its parameters have the same names."""

    def __init__(self, plain: nn.Conv2d) -> None:
        """Lay out the weights of `plain`, float32 on a CPU."""
        super().__init__()
        if plain.padding_mode != "zeros":
            raise ValueError(f"padding_mode: {plain.padding_mode!r} is not zeros")
        self.weight, self.bias = plain.weight, plain.bias
        self._geometry = (plain.padding, plain.stride, plain.dilation, plain.groups)
        self._laid_out = torch.ops.mkldnn._reorder_convolution_weight(plain.weight, *self._geometry)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        if not x.numel():  # oneDNN knows no batch of none
            padding, stride, dilation, groups = self._geometry
            return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return torch.ops.mkldnn._convolution_pointwise(x, self._laid_out, self.bias, *self._geometry, *_PLAIN)
