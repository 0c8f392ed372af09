"""Power-function averages: the profiles of the paper, and any length put together from two."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from common.checkpoint import CheckpointError
from trainer.ema import classic_share, gamma_of, inner_product, power_share
from trainer.presets import Preset
from trainer.snapshots import SNAPSHOTS, average_of_length, save_snapshot, snapshot_every
from trainer.state import new_state

CPU = torch.device("cpu")


def profile(t: float, end: float, gamma: float) -> float:
    return (gamma + 1) * t**gamma / end ** (gamma + 1) if t <= end else 0.0


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_profile_has_the_width_it_is_named_after(length: float) -> None:
    """Integrated numerically, over a training of length 1."""
    gamma = gamma_of(length)
    mean = quad(lambda t: t * profile(t, 1.0, gamma), 0, 1, limit=200)[0]
    variance = quad(lambda t: (t - mean) ** 2 * profile(t, 1.0, gamma), 0, 1, limit=200)[0]
    assert math.sqrt(variance) == pytest.approx(length, rel=1e-3)


def test_the_exponents_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: widths 0.05 and 0.10 are exponents 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.0, 0.5, -1.0])
def test_a_width_that_no_profile_has_is_named(length: float) -> None:
    with pytest.raises(ValueError, match=f"average length: {length}"):
        gamma_of(length)


def test_products_of_profiles() -> None:
    by_hand = quad(lambda t: profile(t, 2.0, 3.0) * profile(t, 5.0, 1.5), 0, 2)[0]
    assert inner_product(2.0, 3.0, 5.0, 1.5) == pytest.approx(by_hand)


def test_the_running_average_weighs_steps_by_their_power() -> None:
    """Against the weighted sum itself, t^gamma over all steps."""
    gamma, values = gamma_of(0.1), np.random.default_rng(0).normal(size=400)
    average = 0.0
    for step, value in enumerate(values, 1):
        average += power_share(step, 0.1) * (value - average)
    weights = np.arange(1, 401) ** (gamma + 1) - np.arange(400) ** (gamma + 1)
    assert average == pytest.approx(float((weights * values).sum() / weights.sum()), rel=1e-9)


def test_the_classic_average_warms_up() -> None:
    assert classic_share(1, 0.999) == pytest.approx(1 - 2 / 11)
    assert classic_share(10**6, 0.999) == pytest.approx(0.001)


def test_any_length_is_put_together_after_training(tiny: Preset, tmp_path: Path) -> None:
    """Weights that wander: the average made of stored ones is the one that would have been kept along."""
    row = replace(tiny, ema="post-hoc", ema_decay=0.0, ema_lengths=(0.05, 0.1), total_examples=320 * tiny.batch)
    state, name = new_state(row, CPU), "head.bias"
    state.averages = {kept: {name: average[name]} for kept, average in state.averages.items()}  # one weight tells it
    assert snapshot_every(row) == 320 // SNAPSHOTS
    walk = torch.Generator().manual_seed(1)
    kept = {length: torch.zeros(state.average[name].shape) for length in (0.07, 0.05, 0.13)}
    bias = dict(state.unet.named_parameters())[name].detach()
    for step in range(1, 321):
        bias.add_(0.1 * torch.randn(bias.shape, generator=walk))
        state.step = step
        state.update_averages(row)
        for length, average in kept.items():
            average.lerp_(bias, power_share(step, length))
        if step % snapshot_every(row) == 0:
            save_snapshot(tmp_path, state, row)
    for length, expected in kept.items():
        step, average = average_of_length(tmp_path, length)
        assert step == 320 and set(average) == set(state.average)
        assert (average[name] - expected).norm() < 0.03 * (bias - expected).norm(), length


def test_an_average_that_reaches_back_before_the_stored_ones_is_refused(tiny: Preset, tmp_path: Path) -> None:
    """As after a warm start at step 300: its shares would not sum to 1, and the weights would be scaled down."""
    row = replace(tiny, ema="post-hoc", ema_decay=0.0, ema_lengths=(0.05, 0.1))
    state = new_state(row, CPU)
    for state.step in (310, 320):
        save_snapshot(tmp_path, state, row)
    with pytest.raises(CheckpointError, match=r"none of length 0.15, .* sum to 0\.8.* \(step 310"):
        average_of_length(tmp_path, 0.15)
    step, average = average_of_length(tmp_path, 0.1)  # one that was stored itself
    assert step == 320
    for name, tensor in state.average.items():
        torch.testing.assert_close(average[name], tensor, atol=1e-3, rtol=1e-3)


def test_too_few_stored_averages_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has stored 0 averages"):
        average_of_length(tmp_path, 0.1)
