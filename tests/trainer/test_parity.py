"""What is published predicts what was trained, or is not published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.checkpoint import CheckpointError, load_stage, publish_stage
from common.unet.unet import UNet
from trainer.parity import check_parity, rounding_error
from trainer.presets import PRESETS

TINY, TINY_SR = PRESETS["tiny-64"].unet, PRESETS["tiny-256"].unet


def weights(config=TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    unet = UNet(config)
    torch.nn.init.normal_(unet.head.weight, std=0.1)
    return unet.state_dict()


@pytest.mark.parametrize("config", [TINY, TINY_SR, replace(TINY, placement=False)])
def test_rounding_is_the_error_of_loaded_weights(config, tmp_path: Path) -> None:
    given = weights(config)
    error = rounding_error(config, given, torch.float16)
    assert 0 < error < 2.0**-9, "a weight's own rounding is at most 2^-11"
    assert 4 < rounding_error(config, given, torch.bfloat16) / error < 16, "three bits fewer"
    size = 64 if config.scale == 1 else 256
    publish_stage(tmp_path, size, config, given, {}, dtype=torch.bfloat16)
    loaded = load_stage(tmp_path, size).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16().float()) for name, tensor in given.items())
    assert rounding_error(config, loaded, torch.bfloat16) == 0


def test_weights_that_rounding_breaks_are_refused() -> None:
    broken = weights()
    broken["head.weight"] = broken["head.weight"] * 1e-7  # below float16's smallest number
    broken["head.bias"] = broken["head.bias"] * 0
    with pytest.raises(CheckpointError, match="rounded to float16 they predict something else"):
        check_parity(replace(TINY, placement=False), without_copy(broken), torch.float16)
    check_parity(replace(TINY, placement=False), without_copy(broken), torch.bfloat16)


def without_copy(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    expected = UNet(replace(TINY, placement=False)).state_dict()
    return {name: given[name] for name in expected}
