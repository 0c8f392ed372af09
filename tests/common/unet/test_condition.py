"""Conditions: taken, stacked and padded without a change in what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from common.unet.condition import concatenate

EXACT: dict[str, float] = {"atol": 1e-10, "rtol": 1e-10}


def conditioning(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in ("x_t", "log_snr")}


def test_take_chooses_and_repeats_rows(any_config, make_unet, make_inputs) -> None:
    unet, inputs = make_unet(any_config), make_inputs(any_config, batch=3)
    condition = unet.condition(**conditioning(inputs))
    said = unet.denoise(inputs["x_t"], inputs["log_snr"], condition)
    rows = torch.tensor([2, 0, 0, 1])
    taken = condition.take(rows)
    assert taken.num_rows == 4
    assert_close(unet.denoise(inputs["x_t"][rows], inputs["log_snr"][rows], taken), said[rows], **EXACT)


@pytest.mark.parametrize("shapes", [((5, 3), (9, 3)), ((5, 3), (2, 1)), ((1, 1), (7, 4), (3, 2)), ((5, 2), (0, 2))])
def test_stacked_with_padding_equals_separate(any_config, shapes, make_unet, make_inputs) -> None:
    """Requests with texts of different lengths and different numbers of neighbors share a batch."""
    unet = make_unet(any_config)
    parts = [
        make_inputs(any_config, batch=i + 1, num_tokens=length, num_neighbors=count, seed=i)
        for i, (length, count) in enumerate(shapes)
    ]
    conditions = [unet.condition(**conditioning(part)) for part in parts]
    x_t, log_snr = (torch.cat([part[name] for part in parts]) for name in ("x_t", "log_snr"))
    separate = torch.cat([unet.denoise(p["x_t"], p["log_snr"], c) for p, c in zip(parts, conditions, strict=True)])
    stacked = concatenate(conditions)
    assert stacked.num_rows == len(x_t)
    assert_close(unet.denoise(x_t, log_snr, stacked), separate, **EXACT)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_row_without_neighbors_stacks_with_one_that_has_them(base_config, order, make_unet, make_inputs) -> None:
    """K = 0 (asked for, or nothing found) shares a batch with K = 3."""
    unet = make_unet(base_config)
    both = (make_inputs(base_config, num_neighbors=0), make_inputs(base_config, num_neighbors=3, seed=2))
    parts = [both[i] for i in order]
    conditions = [unet.condition(**conditioning(part)) for part in parts]
    separate = torch.cat([unet.denoise(p["x_t"], p["log_snr"], c) for p, c in zip(parts, conditions, strict=True)])
    x_t, log_snr = (torch.cat([part[name] for part in parts]) for name in ("x_t", "log_snr"))
    assert_close(unet.denoise(x_t, log_snr, concatenate(conditions)), separate, **EXACT)


def test_one_condition_is_itself(base_config, make_unet, make_inputs) -> None:
    condition = make_unet(base_config).condition(**conditioning(make_inputs(base_config)))
    again = concatenate([condition])
    assert_close(again.text_mask, condition.text_mask)
    assert again.nbytes() == condition.nbytes()


def test_nbytes_counts_every_tensor(base_config, make_unet, make_inputs) -> None:
    """By hand: keys and values of text, of neighbors, masks, pooled text, placement, what is asked and
    offered, augmentation, the neighbors' layers; float64 is 8 bytes."""
    condition = make_unet(base_config).condition(**conditioning(make_inputs(base_config)))
    text = 4 * 2 * (2 * 5 * 16)  # four text attentions (2 blocks down, 2 up), keys and values, B L width
    neighbors = 2 * 2 * 3 * (64 * 8 + 16 * 16)  # keys and values, B, K, 8 x 8 cells of 8 and 4 x 4 of 16 channels
    pictures = 2 * 3 * 4 * 16 * 16  # B, K, three colors and opacity
    asked, placement = 2 * (1 + 3) * 32, 2 * 7
    assert condition.nbytes() == 8 * (text + neighbors + 2 * 16 + placement + asked + 2 + pictures) + 2 * 5 + 2 * 3
