"""Convolutions whose weights lie in memory as oneDNN's kernels read them, for passes on a CPU.

PyTorch hands oneDNN a convolution's weights as they lie, and oneDNN lays them out anew at every pass: at one or two rows,
a third of the time of a convolution with 256 channels. Here it is done once. The operators are those that torch.compile
puts in place of convolutions (torch/_inductor/fx_passes/mkldnn_fusion.py, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_PLAIN = ("none", [], "")  # no operation on the result: its name, its numbers, its algorithm


def packed(module: M) -> M:
    """The module, changed in place: its convolutions have their weights a second time, laid out.

    Weights may be loaded and moved as ever, which lays them out anew; written over in place they may not be: nobody would
    notice. Where weights are not float32 on a CPU, or PyTorch has no oneDNN, nothing is changed. Convolutions of single
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
    """Does what a convolution does; its parameters have the same names. Where a gradient is asked for, it is a plain one."""

    _laid_out: Tensor | None

    def __init__(self, plain: nn.Conv2d) -> None:
        """Lay out the weights of `plain`, float32 on a CPU."""
        super().__init__()
        if plain.padding_mode != "zeros":
            raise ValueError(f"padding_mode: {plain.padding_mode!r} is not zeros")
        self.weight, self.bias = plain.weight, plain.bias
        self._geometry = (plain.padding, plain.stride, plain.dilation, plain.groups)
        self._lay_out()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]."""
        asks = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if self._laid_out is None or asks or not x.numel():  # oneDNN knows no gradients, and no batch of none
            padding, stride, dilation, groups = self._geometry
            return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return torch.ops.mkldnn._convolution_pointwise(x, self._laid_out, self.bias, *self._geometry, *_PLAIN)

    @torch.no_grad()
    def _lay_out(self) -> None:
        fits = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self._laid_out = reorder(self.weight.detach(), *self._geometry) if fits else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConvolution:
        super()._apply(fn, recurse)
        self._lay_out()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._lay_out()
