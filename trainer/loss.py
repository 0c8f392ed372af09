"""The training loss, and the paired held-out losses that show retrieval being learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.conditioning import keep
from common.diffusion.parameterization import diffuse, loss_weight, target
from common.diffusion.schedule import alpha_sigma, log_snr
from common.stages import StageSpec
from common.unet.collage import over_ground
from common.unet.condition import Condition
from common.unet.reference import place_layers
from common.unet.unet import UNet
from trainer.batches import Batch

PLACEMENT_WEIGHT = 0.1
PREFERENCE_WEIGHT = 0.01


def condition_of(unet: UNet, spec: StageSpec, batch: Batch) -> Condition:
    """The batch's condition, nothing dropped: each neighbor set is encoded once and shared by its examples."""
    low_res, augmentation = None, None
    if unet.config.scale > 1:
        augmentation = _log_snr(spec, batch.low_res_t)
        alpha, sigma = _rows(augmentation)
        low_res = diffuse(batch.low_res, batch.low_res_eps, alpha, sigma)
    return unet.condition(
        text=batch.text,
        text_mask=batch.text_mask,
        neighbors=batch.neighbors,
        neighbor_text=batch.neighbor_text,
        neighbor_text_mask=batch.neighbor_text_mask,
        neighbor_mask=batch.neighbor_mask,
        low_res=low_res,
        augmentation=augmentation,
        group=batch.group,
    )


def example_losses(unet: UNet, spec: StageSpec, batch: Batch, condition: Condition) -> Tensor:
    """Weighted squared error of each example [B] under a condition."""
    log_snr_t = _log_snr(spec, batch.t)
    alpha, sigma = _rows(log_snr_t)
    x_t = diffuse(batch.x0, batch.eps, alpha, sigma)
    said = unet(x_t, log_snr_t, condition)
    wanted = target(spec.prediction, batch.x0, batch.eps, alpha, sigma)
    weight = loss_weight(spec.prediction, log_snr_t.exp(), spec.loss_gamma)
    return weight * (said.float() - wanted).square().mean(dim=(1, 2, 3))


def training_loss(unet: UNet, spec: StageSpec, batch: Batch) -> Tensor:
    """Mean loss of a batch, with its draws of dropped text and dropped neighbors.

    The picture is drawn at its true place: what the text says of that is learnt by itself, since the picture's loss
    would blur it, and a neighbor laid beside its place is no help.
    """
    condition = keep(condition_of(unet, spec, batch), batch.keep_text, batch.keep_neighbors)
    placed = keep(replace(condition, placement=batch.placement), batch.keep_text, batch.keep_neighbors)
    loss = example_losses(unet, spec, batch, placed if unet.config.placement else condition).mean()
    if unet.config.placement:
        loss = loss + PLACEMENT_WEIGHT * placement_loss(batch, condition)
        loss = loss + PREFERENCE_WEIGHT * preference_loss(unet, batch, condition)
    return loss


def placement_loss(batch: Batch, condition: Condition) -> Tensor:
    """Squared error of the placement and the color that the text says, where there is text.

    The pictures are composed here, so that it is known; left to the picture's loss alone it is learnt slowly, from the
    high frequencies of the positions, and into the wrong zoom.
    """
    error = (condition.placement.float() - batch.placement).square().mean(1)
    return (error * batch.keep_text).mean()


def preference_loss(unet: UNet, batch: Batch, condition: Condition) -> Tensor:
    """Cross entropy of naming, from the captions alone, the neighbor that lies nearest to the picture; 0 without neighbors."""
    assert unet.preference is not None
    if not condition.neighbor_mask.shape[1]:
        return batch.x0.new_zeros(())
    scores = unet.preference.score(condition.asked, condition.offered)
    mask = condition.neighbor_mask
    losses = F.cross_entropy(
        scores.masked_fill(~mask, -1e4), nearest_of(batch, condition.pictures, mask), reduction="none"
    )
    return (losses * (batch.keep_text & (mask.sum(1) > 1))).mean()


def nearest_of(batch: Batch, layers: Tensor, mask: Tensor) -> Tensor:
    """Which neighbor, laid at the picture's true place on its true ground, is nearest to each picture [B].

    Args:
        layers: the neighbors of each picture, cut out [B, K, 4, h, w]; mask [B, K], true where there is one.
    """
    size = (batch.x0.shape[2], batch.x0.shape[3])
    laid = over_ground(place_layers(layers, batch.placement, size), batch.placement[:, 4:] + 1.0)
    far = (laid - batch.x0[:, None]).square().mean((2, 3, 4))
    return far.masked_fill(~mask, float("inf")).argmin(1)


@torch.no_grad()
def paired_losses(unet: UNet, spec: StageSpec, batches: list[Batch]) -> dict[str, float]:
    """Held-out loss on the same times and noise, under the four conditions and with another prompt's neighbors."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        condition = condition_of(unet, spec, batch)
        yes = torch.ones_like(batch.keep_text)
        no = torch.zeros_like(yes)
        # Examples of one set stand together: rolling by a whole set gives every example a stranger's neighbors.
        draws = batch.group.shape[0] // batch.neighbors.shape[0]
        stranger = torch.arange(batch.group.shape[0]).roll(draws)
        rolled = condition.take(stranger)
        variants = {
            "full": condition,
            "text_only": keep(condition, yes, no),
            "neighbors_only": keep(condition, no, yes),
            "none": keep(condition, no, no),
            "wrong_neighbors": _with_neighbors(condition, rolled),
        }
        if not unet.config.uses_neighbors:
            variants = {"full": condition}  # super-resolution without a condition to drop
        for name, variant in variants.items():
            sums.setdefault(name, []).append(float(example_losses(unet, spec, batch, variant).mean()))
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _with_neighbors(condition: Condition, other: Condition) -> Condition:
    names = ("neighbors", "neighbor_mask", "pictures", "offered")
    return replace(condition, **{name: getattr(other, name) for name in names})


def _log_snr(spec: StageSpec, t: Tensor) -> Tensor:
    return log_snr(spec.schedule, t).float()  # where t lies: a step waits for no copy to the host


def _rows(log_snr_t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(log_snr_t)
    return alpha[:, None, None, None], sigma[:, None, None, None]
