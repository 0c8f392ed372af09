"""A U-Net behind a compiler: passes are padded to a few shapes, since every new one is compiled anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.unet.condition import Condition
from common.unet.unet import UNet

Compiler = Literal["none", "inductor", "graphs"]
COMPILERS: tuple[Compiler, ...] = ("none", "inductor", "graphs")
MODES = {"inductor": "default", "graphs": "reduce-overhead"}
PASSES = (1, 2, 3)  # guidance asks for so many rows of a trajectory
NEIGHBORS = (0, 1, 2, 4, 8, 16)
TOKENS = 16  # texts are padded to multiples of this
RECOMPILES = 256  # shapes are few, and all are wanted


class Forward(Protocol):
    """`UNet.forward`."""

    def __call__(self, x_t: Tensor, log_snr: Tensor, condition: Condition, *, bold: bool = False) -> Tensor:
        """The prediction."""
        ...


def compiled(unet: UNet, compiler: Compiler, batches: Sequence[int]) -> UNet:
    """The U-Net with its forward pass compiled; the same one where `compiler` is none.

    Args:
        compiler: `inductor` (torch.compile) or `graphs` (the same, replayed as CUDA graphs; for GPUs).
        batches: trajectories of a pass; rows are padded to the smallest of these, times one to three, that holds them.
    """
    if compiler == "none":
        return unet
    torch._dynamo.config.recompile_limit = RECOMPILES  # pyright: ignore[reportPrivateImportUsage]
    forward: Forward = torch.compile(unet.forward, mode=MODES[compiler], dynamic=False)
    unet.forward = Padded(forward, rows=sorted({b * p for b in batches for p in PASSES}))
    return unet


class Padded:
    """A forward pass that sees few shapes: rows, text and neighbors are padded with what nobody reads."""

    def __init__(self, forward: Forward, *, rows: Sequence[int]) -> None:
        """`rows`, ascending: more than the last go as they are."""
        self._forward = forward
        self._rows = rows

    def __call__(self, x_t: Tensor, log_snr: Tensor, condition: Condition, *, bold: bool = False) -> Tensor:
        """Same as `UNet.forward`, which knows no newcomers: with them each pass would have a shape of its own."""
        count = x_t.shape[0]
        missing = _at_least(count, self._rows) - count
        condition = _padded(condition)
        if missing:
            index = torch.tensor([*range(count), *([0] * missing)], device=x_t.device)
            x_t = x_t[index].contiguous(memory_format=torch.channels_last)
            log_snr, condition = log_snr[index], condition.take(index)
        return self._forward(x_t, log_snr, condition, bold=bold)[
            :count
        ].clone()  # a graph's next replay writes there again


def _at_least(count: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if size >= count), count)


def _padded(condition: Condition) -> Condition:
    length, count = condition.text_mask.shape[1], condition.neighbor_mask.shape[1]
    texts = -length % TOKENS
    neighbors = _at_least(count, NEIGHBORS) - count
    sizes = [key.shape[2] // max(count, 1) for key, _ in condition.neighbors]
    pictures = neighbors if condition.pictures.shape[1] else 0
    return replace(
        condition,
        text=tuple((F.pad(k, (0, 0, 0, texts)), F.pad(v, (0, 0, 0, texts))) for k, v in condition.text),
        text_mask=F.pad(condition.text_mask, (0, texts)),
        neighbors=tuple(
            (F.pad(k, (0, 0, 0, neighbors * n)), F.pad(v, (0, 0, 0, neighbors * n)))
            for (k, v), n in zip(condition.neighbors, sizes, strict=True)
        ),
        neighbor_mask=F.pad(condition.neighbor_mask, (0, neighbors)),
        offered=F.pad(condition.offered, (0, 0, 0, pictures)),
        pictures=F.pad(condition.pictures, (0, 0, 0, 0, 0, 0, 0, pictures)),
    )
