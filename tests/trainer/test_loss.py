"""The loss by hand, and the paired losses that show retrieval being learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.conditioning import keep
from common.diffusion.schedule import alpha_sigma, log_snr
from common.stages import stage
from common.unet.unet import UNet
from trainer.batches import Batch, rng_of
from trainer.dataset import RENDER_SIZE, Prepared
from trainer.loss import (
    PLACEMENT_WEIGHT,
    PREFERENCE_WEIGHT,
    condition_of,
    example_losses,
    paired_losses,
    preference_loss,
    training_loss,
)
from trainer.presets import Preset
from trainer.sources import CropSource, NeighborSource

CONDITIONS = {"full", "text_only", "neighbors_only", "none", "wrong_neighbors"}


def unet_of(row: Preset) -> UNet:
    """With every weight moved, so that each input matters."""
    torch.manual_seed(0)
    unet = UNet(row.unet)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


@pytest.fixture
def batch(prepared: Prepared, tiny: Preset) -> Batch:
    return NeighborSource(prepared=prepared, preset=tiny).batch(rng_of(0, 1), 16)


@pytest.fixture
def crop_batch(prepared: Prepared, tiny_256: Preset) -> Batch:
    pixels, owners = prepared.pictures[RENDER_SIZE], np.arange(len(prepared.keys))
    return CropSource(prepared=prepared, preset=tiny_256, spec=stage(256), pixels=pixels, owners=owners).batch(
        rng_of(0, 1), 32
    )


class Says:
    """A network that always says one thing, and remembers what it was asked."""

    def __init__(self, said: Tensor) -> None:
        self.said = said

    def __call__(self, x_t: Tensor, log_snr_t: Tensor, condition: Any) -> Tensor:
        self.x_t, self.log_snr = x_t, log_snr_t
        return self.said


def test_v_prediction_loss_by_hand(batch: Batch) -> None:
    """Weight min(SNR + 1, gamma) / (SNR + 1), on the cosine schedule."""
    spec = replace(stage(64), schedule="cosine", prediction="v", loss_gamma=5.0)
    network = Says(torch.full_like(batch.x0, 0.25))
    losses = example_losses(network, spec, batch, None)  # type: ignore[arg-type]
    for i in range(len(batch.x0)):
        level = float(log_snr("cosine", float(batch.t[i])))
        alpha, sigma = (float(a) for a in alpha_sigma(np.float64(level)))
        wanted = alpha * batch.eps[i] - sigma * batch.x0[i]
        snr = (alpha / sigma) ** 2
        expected = min(snr + 1, spec.loss_gamma) / (snr + 1) * float((0.25 - wanted).square().mean())
        assert float(losses[i]) == pytest.approx(expected, rel=2e-3)
        assert float(network.log_snr[i]) == pytest.approx(level, abs=1e-4)
        torch.testing.assert_close(network.x_t[i], alpha * batch.x0[i] + sigma * batch.eps[i], atol=1e-5, rtol=1e-4)


def test_x0_prediction_loss_by_hand(crop_batch: Batch) -> None:
    """Weight min(SNR + 1, gamma)."""
    spec = replace(stage(256), schedule="cosine", prediction="x0", loss_gamma=5.0)
    losses = example_losses(Says(torch.zeros_like(crop_batch.x0)), spec, crop_batch, None)  # type: ignore[arg-type]
    snr = np.exp(log_snr("cosine", crop_batch.t.double().numpy()))
    expected = np.minimum(snr + 1, 5.0) * crop_batch.x0.square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(losses.numpy(), expected, rtol=2e-3)


def test_a_perfect_network_has_no_loss(crop_batch: Batch) -> None:
    spec = replace(stage(256), prediction="x0")
    assert example_losses(Says(crop_batch.x0), spec, crop_batch, None).abs().max() == 0  # type: ignore[arg-type]


def test_low_res_is_noised_at_its_own_level(crop_batch: Batch, tiny_256: Preset) -> None:
    condition = condition_of(unet_of(tiny_256), stage(256), crop_batch)
    levels = log_snr("cosine", crop_batch.low_res_t.double().numpy())
    np.testing.assert_allclose(condition.augmentation.numpy(), levels, rtol=1e-5, atol=1e-4)
    alpha, sigma = (torch.from_numpy(a).float()[:, None, None, None] for a in alpha_sigma(levels))
    expected = alpha * crop_batch.low_res + sigma * crop_batch.low_res_eps
    torch.testing.assert_close(condition.low_res, expected, atol=1e-5, rtol=1e-4)


def test_neighbors_are_encoded_once_a_group(batch: Batch, tiny: Preset) -> None:
    unet, encoded = unet_of(tiny), []
    unet.dstack.register_forward_hook(lambda module, given, features: encoded.append(len(given[0])))
    condition = condition_of(unet, stage(64), batch)
    assert encoded == [tiny.groups * tiny.neighbors]
    assert condition.num_rows == tiny.batch


def test_training_loss_drops_what_the_batch_says(batch: Batch, tiny: Preset) -> None:
    unet, spec = unet_of(tiny), stage(64)
    yes = torch.ones(tiny.batch, dtype=torch.bool)
    condition = condition_of(unet, spec, batch)
    losses = {}
    for text in (yes, ~yes):
        for neighbors in (yes, ~yes):
            said = training_loss(unet, spec, replace(batch, keep_text=text, keep_neighbors=neighbors))
            at_its_place = keep(replace(condition, placement=batch.placement), text, neighbors)
            pictures = example_losses(unet, spec, batch, at_its_place).mean()
            said_places = condition.placement.detach().numpy()
            misplaced = np.square(said_places - batch.placement.numpy()).mean(1) * text.numpy()
            preferred = preference_loss(unet, replace(batch, keep_text=text), keep(condition, text, neighbors))
            extra = PLACEMENT_WEIGHT * float(misplaced.mean()) + PREFERENCE_WEIGHT * float(preferred.detach())
            torch.testing.assert_close(said, pictures + extra)
            losses[bool(text[0]), bool(neighbors[0])] = float(said.detach())
    assert len(set(losses.values())) == 4, "each condition says something else"


def test_the_preferred_neighbor_is_the_one_that_lies_nearest(batch: Batch, tiny: Preset) -> None:
    """A neighbor that is the picture itself is named: the loss falls where its score rises, and not where text or the
    other neighbor is missing."""
    unet = unet_of(tiny)
    condition = condition_of(unet, stage(64), batch)
    exact = torch.cat([batch.x0, torch.ones_like(batch.x0[:, :1])], 1)[:, None]
    still = torch.zeros_like(batch.placement)
    layers = torch.cat([torch.zeros_like(exact), exact], 1)
    yes = torch.ones(tiny.batch, dtype=torch.bool)
    given = replace(batch, placement=still, keep_text=yes)
    toward = torch.stack([-condition.asked, condition.asked], 1) * 100
    named = replace(
        condition, pictures=layers, offered=toward, neighbor_mask=torch.ones(tiny.batch, 2, dtype=torch.bool)
    )
    assert (
        preference_loss(unet, given, named) < 0.1 < 1.0 < preference_loss(unet, given, replace(named, offered=-toward))
    )
    assert preference_loss(unet, replace(given, keep_text=~yes), named) == 0
    alone = replace(named, neighbor_mask=torch.tensor([[False, True]]).expand(tiny.batch, 2))
    assert preference_loss(unet, given, alone) == 0


def test_paired_losses_are_the_five_on_the_same_draws(prepared: Prepared, tiny: Preset) -> None:
    unet, spec = unet_of(tiny), stage(64)
    source = NeighborSource(prepared=prepared, preset=tiny)
    batches = [source.held_out_batch(rng_of(2, s), 16) for s in range(2)]
    losses = paired_losses(unet, spec, batches)
    assert set(losses) == CONDITIONS
    assert all(np.isfinite(v) for v in losses.values())
    assert losses == paired_losses(unet, spec, batches), "the same every time"
    assert losses["full"] != losses["wrong_neighbors"] != losses["none"]
    assert len(set(losses.values())) == 5
    yes = torch.ones(tiny.batch, dtype=torch.bool)
    bare = [example_losses(unet, spec, b, keep(condition_of(unet, spec, b), ~yes, ~yes)).mean() for b in batches]
    assert losses["none"] == pytest.approx(float(torch.stack(bare).mean().detach()), rel=1e-6)


def test_wrong_neighbors_are_those_of_another_group(batch: Batch, tiny: Preset) -> None:
    unet, spec = unet_of(tiny), stage(64)
    strangers = batch.group.roll(tiny.draws)
    assert not (strangers == batch.group).any()
    wrong = example_losses(unet, spec, batch, condition_of(unet, spec, replace(batch, group=strangers))).mean()
    losses = paired_losses(unet, spec, [batch])
    assert losses["wrong_neighbors"] == pytest.approx(float(wrong.detach()), rel=1e-5)


def test_paired_losses_learn_nothing(batch: Batch, tiny: Preset) -> None:
    unet = unet_of(tiny)
    paired_losses(unet, stage(64), [batch])
    assert all(p.grad is None for p in unet.parameters())


def test_paired_losses_of_super_resolution(crop_batch: Batch, tiny_256: Preset) -> None:
    losses = paired_losses(unet_of(tiny_256), stage(256), [crop_batch])
    assert set(losses) == {"full"}, "it has no text and no neighbors to drop"
