"""The Inception network of FID, with weights from a user's file.

The network is Inception v3 (Szegedy et al. 2016, arXiv 1512.00567) as TensorFlow's 2015-12-05 graph has it, which Heusel et
al. 2017 measured FID with; pytorch-fid (Seitzer 2020) ported its weights, `pt_inception-2015-12-05-6726825d.pth`. Three
things differ from the network as published: average pools do not count their padding, the last block pools by maximum,
and there are 1008 classes. The weights may not be shipped here; without them there is no FID, and no other network's
distance is called so.

Limits: features of ImageNet's classes say little of icons, faces or text; use CMMD beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import sha256_file

SIDE = 299
FEATURES = 2048
_BATCH = 32
_UNUSED = ("fc.weight", "fc.bias")  # the classifier

Kernel = int | tuple[int, int]
Step = str | tuple[str, ...]
"""A convolution by name, `avg`, `max` (same size) or `halve` (maximum, stride 2); a tuple: each of them, side by side."""


class _Convolution(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, width: int, kernel: Kernel = 1, *, stride: int = 1, same: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Branches(nn.Module):
    """Branches side by side, each a row of steps over convolutions of the block."""

    def __init__(self, convolutions: Mapping[str, _Convolution], branches: Sequence[Sequence[Step]]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(branch, x) for branch in self.branches], 1)

    def _branch(self, steps: Sequence[Step], x: Tensor) -> Tensor:
        for step in steps:
            x = torch.cat([self._step(s, x) for s in step], 1) if isinstance(step, tuple) else self._step(step, x)
        return x

    def _step(self, step: str, x: Tensor) -> Tensor:
        match step:
            case "avg":
                return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            case "max":
                return F.max_pool2d(x, 3, 1, 1)
            case "halve":
                return F.max_pool2d(x, 3, 2)
        return self.get_submodule(step)(x)


def _block_35(inputs: int, pooled: int) -> _Branches:
    convolutions = {
        "branch1x1": _Convolution(inputs, 64),
        "branch5x5_1": _Convolution(inputs, 48),
        "branch5x5_2": _Convolution(48, 64, 5),
        "branch3x3dbl_1": _Convolution(inputs, 64),
        "branch3x3dbl_2": _Convolution(64, 96, 3),
        "branch3x3dbl_3": _Convolution(96, 96, 3),
        "branch_pool": _Convolution(inputs, pooled),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return _Branches(convolutions, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], [*double], ["avg", "branch_pool"]])


def _halving_35() -> _Branches:
    convolutions = {
        "branch3x3": _Convolution(288, 384, 3, stride=2, same=False),
        "branch3x3dbl_1": _Convolution(288, 64),
        "branch3x3dbl_2": _Convolution(64, 96, 3),
        "branch3x3dbl_3": _Convolution(96, 96, 3, stride=2, same=False),
    }
    return _Branches(convolutions, [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["halve"]])


def _block_17(width: int) -> _Branches:
    across, down = (1, 7), (7, 1)
    convolutions = {
        "branch1x1": _Convolution(768, 192),
        "branch7x7_1": _Convolution(768, width),
        "branch7x7_2": _Convolution(width, width, across),
        "branch7x7_3": _Convolution(width, 192, down),
        "branch7x7dbl_1": _Convolution(768, width),
        "branch7x7dbl_2": _Convolution(width, width, down),
        "branch7x7dbl_3": _Convolution(width, width, across),
        "branch7x7dbl_4": _Convolution(width, width, down),
        "branch7x7dbl_5": _Convolution(width, 192, across),
        "branch_pool": _Convolution(768, 192),
    }
    single = [f"branch7x7_{i}" for i in (1, 2, 3)]
    double = [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]
    return _Branches(convolutions, [["branch1x1"], single, double, ["avg", "branch_pool"]])


def _halving_17() -> _Branches:
    convolutions = {
        "branch3x3_1": _Convolution(768, 192),
        "branch3x3_2": _Convolution(192, 320, 3, stride=2, same=False),
        "branch7x7x3_1": _Convolution(768, 192),
        "branch7x7x3_2": _Convolution(192, 192, (1, 7)),
        "branch7x7x3_3": _Convolution(192, 192, (7, 1)),
        "branch7x7x3_4": _Convolution(192, 192, 3, stride=2, same=False),
    }
    long = [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]
    return _Branches(convolutions, [["branch3x3_1", "branch3x3_2"], long, ["halve"]])


def _block_8(inputs: int, pool: str) -> _Branches:
    across, down = (1, 3), (3, 1)
    convolutions = {
        "branch1x1": _Convolution(inputs, 320),
        "branch3x3_1": _Convolution(inputs, 384),
        "branch3x3_2a": _Convolution(384, 384, across),
        "branch3x3_2b": _Convolution(384, 384, down),
        "branch3x3dbl_1": _Convolution(inputs, 448),
        "branch3x3dbl_2": _Convolution(448, 384, 3),
        "branch3x3dbl_3a": _Convolution(384, 384, across),
        "branch3x3dbl_3b": _Convolution(384, 384, down),
        "branch_pool": _Convolution(inputs, 192),
    }
    single: list[Step] = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    double: list[Step] = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return _Branches(convolutions, [["branch1x1"], single, double, [pool, "branch_pool"]])


class Inception(nn.Module):
    """Pictures to the 2,048 features of FID. Parameters are named as in pytorch-fid's file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = (
            "Conv2d_1a_3x3",
            "Conv2d_2a_3x3",
            "Conv2d_2b_3x3",
            "halve",
            "Conv2d_3b_1x1",
            "Conv2d_4a_3x3",
            "halve",
        )
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, same=False)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, same=False)
        mixed = {
            "Mixed_5b": _block_35(192, 32),
            "Mixed_5c": _block_35(256, 64),
            "Mixed_5d": _block_35(288, 64),
            "Mixed_6a": _halving_35(),
            "Mixed_6b": _block_17(128),
            "Mixed_6c": _block_17(160),
            "Mixed_6d": _block_17(160),
            "Mixed_6e": _block_17(192),
            "Mixed_7a": _halving_17(),
            "Mixed_7b": _block_8(1280, "avg"),
            "Mixed_7c": _block_8(2048, "max"),
        }
        for name, block in mixed.items():
            self.add_module(name, block)
        self.layers += tuple(mixed)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 2048] of pixels [B, 3, H, W] in [0, 1], of any size."""
        x = 2.0 * F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1.0
        for layer in self.layers:
            x = F.max_pool2d(x, 3, 2) if layer == "halve" else self.get_submodule(layer)(x)
        return x.mean((2, 3))


class InceptionFeatures:
    """The network with its weights."""

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Load pytorch-fid's file (or the same tensors as safetensors), strictly.

        Raises:
            ValueError: it is no such file; the message names it and what it lacks.
        """
        model = Inception()
        model.load_state_dict(_tensors(path, model.state_dict()))
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = device
        self.name = f"inception-{sha256_file(path)[:12]}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, 2048] of uint8 pictures [H, W, 3], batch by batch. A picture's features depend on it alone."""
        found = [self._of(pictures[i : i + _BATCH]) for i in range(0, len(pictures), _BATCH)]
        return np.concatenate(found) if found else np.zeros((0, FEATURES), np.float32)

    def _of(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
                raise ValueError(f"pictures: {picture.dtype} {list(picture.shape)} is not uint8 [H, W, 3]")
        if len({picture.shape for picture in pictures}) > 1:
            return np.concatenate([self._of([picture]) for picture in pictures])
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).to(self._device).float() / 255.0
        return self._model(pixels).float().cpu().numpy()


def _tensors(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        is_safe = path.suffix == ".safetensors"
        found = load_file(path) if is_safe else torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"inception: {path} does not exist") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"inception: {path} cannot be read ({_first_line(error)})") from None
    except Exception as error:  # the unpickler's own errors have no type in common: it holds more than tensors
        raise ValueError(f"inception: {path} holds more than weights ({_first_line(error)})") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"inception: {path} is no table of tensors")
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    found = counters | {name: tensor for name, tensor in found.items() if name not in _UNUSED}
    wrong = sorted(set(found) ^ set(wanted)) or sorted(n for n in wanted if found[n].shape != wanted[n].shape)
    if wrong:
        raise ValueError(f"inception: {path} is not pytorch-fid's: {wrong[:3]} missing, unknown or of another shape")
    broken = sorted(name for name, tensor in found.items() if not torch.isfinite(tensor).all())
    if broken:
        raise ValueError(f"inception: {path}: {broken[:3]} are not finite")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
