"""The U-Nets that training is measured beside: imagen-pytorch's, and a diffusers one with the blocks of DeepFloyd IF.

Each is about 12 M parameters and 3.7 GFLOP a pass of a 64 x 64 picture (`training.MATCHED` is ours of that size).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import T5Config

IMAGEN = "imagen_pytorch"
_PEERS = Path("build/training-peers")


class ImagenPytorch(nn.Module):
    """imagen-pytorch's `Unet`; t is in [0, 1]."""

    def __init__(self, text_width: int, tokens: int) -> None:
        super().__init__()
        self.unet = _imagen_unet()(
            dim=32,
            dim_mults=(1, 2, 4, 8),
            cond_dim=64,
            text_embed_dim=text_width,
            max_text_len=tokens,
            layer_attns=(False, False, False, True),
            layer_cross_attns=(False, True, True, True),
        )

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Prediction [B, 3, H, W] from x_t, t [B], text [B, L, D] and its mask [B, L]."""
        return self.unet(x_t, t, text_embeds=text, text_mask=mask)


class DiffusersIF(nn.Module):
    """diffusers' U-Net with the block types, the embeddings, the norms and the activation of IF's first stage.

    IF attends on its grids of 32, 16 and 8 pixels (`attends` 3, the lowest levels); on 8 alone it would do less of what
    processors are slow at.
    """

    def __init__(self, text_width: int, side: int, *, widths: tuple[int, int, int, int], attends: int) -> None:
        super().__init__()
        plain = 4 - attends
        self.unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=3,
            out_channels=3,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",) * attends,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",) * attends + ("ResnetUpsampleBlock2D",) * plain,
            attention_head_dim=32,
            norm_num_groups=8,
            cross_attention_dim=text_width,
            cross_attention_norm="group_norm",
            encoder_hid_dim=text_width,
            addition_embed_type="text",
            addition_embed_type_num_heads=8,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            time_embedding_act_fn="gelu",
        )

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """As `ImagenPytorch`; IF counts times from 0 to 999."""
        return self.unet(x_t, 999 * t, text, encoder_attention_mask=mask).sample


def are_installed() -> bool:
    """Whether `make bench-training` has fetched imagen-pytorch."""
    return (_PEERS / IMAGEN).is_dir() or importlib.util.find_spec(IMAGEN) is not None


def _imagen_unet() -> type[nn.Module]:
    """The class alone: the package's own `__init__` loads data sets, a trainer and more, none of which is measured."""
    if not are_installed():
        raise RuntimeError(f"{IMAGEN} is not in {_PEERS}: make bench-training installs it")
    if str(_PEERS) not in sys.path:
        sys.path.append(str(_PEERS))
    if IMAGEN not in sys.modules:
        spec = importlib.util.find_spec(IMAGEN)
        assert spec is not None
        sys.modules[IMAGEN] = importlib.util.module_from_spec(spec)  # made, and not executed
    with _unasked():
        return importlib.import_module(f"{IMAGEN}.{IMAGEN}").Unet


@contextmanager
def _unasked() -> Iterator[None]:
    """What importing the module asks for and its U-Net does not use: the hub (for the width of a T5), and torchvision."""
    names = ("torchvision", "torchvision.transforms")
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
    try:
        with mock.patch.object(T5Config, "from_pretrained", return_value=T5Config()):
            yield
    finally:
        for name in absent:
            del sys.modules[name]
