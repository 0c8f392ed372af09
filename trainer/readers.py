"""The readers of the captions, trained by themselves, before or beside the rest of a first stage.

A text says where the entity lies and on what color (`Placement`), and which of the neighbors suits it (`Preference`). Both are
known of the pictures that are composed here, so that neither needs the U-Net: thousands of captions are read in the time that
it takes to draw hundreds. Learnt from the picture's loss alone they come late, and blurred (`trainer.loss`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.unet.collage import Preference, cut_out
from common.unet.reference import Placement
from common.unet.unet import UNet
from trainer.batches import Batch, rng_of
from trainer.dataset import Prepared
from trainer.loss import nearest_of
from trainer.presets import Preset
from trainer.sources import NeighborSource

LEVELS = 127.5  # of 255, in a unit of [-1, 1]
_TRAINING, _HELD_OUT = 2 * 10**9, 3 * 10**9  # added to the preset's seed: no draw is one of the U-Net's training

Show = Callable[[int, dict[str, float]], None]
"""Told of a step that was taken and its losses."""


@dataclass(frozen=True, kw_only=True)
class ReadersPlan:
    """How long they are trained.

    Attributes:
        steps: of Adam.
        captions: of training pairs, read in a step.
        learning_rate: at first; it falls to zero along a cosine.
        warmup_steps: over which it rises before.
    """

    steps: int = 2500
    captions: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 50

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        falling = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * falling


class Readers:
    """The readers of one U-Net, and what they are trained on."""

    def __init__(self, unet: UNet, preset: Preset, prepared: Prepared, plan: ReadersPlan) -> None:
        """Begin: the readers of `unet` become those of the preset's seed, whatever they were.

        Raises:
            ValueError: this stage's U-Net has none.
        """
        if unet.placement is None or unet.preference is None:
            raise ValueError(f"--preset: {preset.name} has no readers of captions: its U-Net lays no neighbors")
        self.placement: Placement = unet.placement
        self.preference: Preference = unet.preference
        self._device, self._plan, self._seed = unet.device, plan, preset.seed
        self._side = preset.curriculum[0][1]
        row = replace(preset, groups=plan.captions, draws=1, accumulation=1, text_dropout=0.0, neighbor_dropout=0.0)
        self._source = NeighborSource(prepared=prepared, preset=row)
        torch.manual_seed(preset.seed)
        fresh = UNet(preset.unet).state_dict()
        with torch.no_grad():
            for name, tensor in self.named_tensors(unet).items():
                tensor.copy_(fresh[name])

    @staticmethod
    def named_tensors(unet: nn.Module) -> dict[str, Tensor]:
        """The readers' weights by the names that they have in the U-Net's."""
        return {
            name: tensor for name, tensor in unet.state_dict().items() if name.startswith(("placement.", "preference."))
        }

    def fit(self, show: Show) -> None:
        """Train them to the plan's end; the same plan, seed and data give the same weights on the same machine."""
        parameters = [*self.placement.parameters(), *self.preference.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self._plan.learning_rate)
        for step in range(self._plan.steps):
            batch = self._source.batch(rng_of(_TRAINING + self._seed, step), self._side).to(self._device)
            for group in optimizer.param_groups:
                group["lr"] = self._plan.rate(step)
            placing, naming, _ = self._losses(batch)
            optimizer.zero_grad(set_to_none=True)
            (placing + naming).backward()  # of weights apart: neither loss weighs on the other
            optimizer.step()
            placing, naming = float(placing.detach()), float(naming.detach())
            show(step + 1, {"loss": placing + naming, "placement_loss": placing, "preference_loss": naming})

    @torch.no_grad()
    def held_out(self, num_batches: int = 4) -> dict[str, float]:
        """How well captions of held-out pairs are read, the same ones every time.

        `color_error`: mean difference of the ground's color, of 255. `place_error`: of zoom and shift, in canvas units.
        `neighbor_named`: share of pictures whose nearest neighbor has the best score, of those with several; not given
        where none has.
        """
        found: dict[str, list[float]] = {"color_error": [], "place_error": [], "neighbor_named": []}
        for i in range(num_batches):
            batch = self._source.held_out_batch(rng_of(_HELD_OUT + self._seed, i), self._side).to(self._device)
            off = (self.placement(batch.text, batch.text_mask) - batch.placement).abs()
            found["color_error"].append(float(off[:, 4:].mean()) * LEVELS)
            found["place_error"].append(float(off[:, :4].mean()))
            found["neighbor_named"] += self._losses(batch)[2].float().tolist()
        return {name: fmean(values) for name, values in found.items() if values}

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error of placement and color, cross entropy of the nearest neighbor, and of each picture that has several
        neighbors whether it is named."""
        placing = (self.placement(batch.text, batch.text_mask) - batch.placement).square().mean()
        mask = batch.neighbor_mask
        several = mask.sum(1) > 1
        if not bool(several.any()):
            return placing, placing.new_zeros(()), several.new_zeros(0)
        shape = mask.shape
        offered = self.preference.offered(batch.neighbor_text.flatten(0, 1), batch.neighbor_text_mask.flatten(0, 1))
        asked = self.preference.asked(batch.text, batch.text_mask)
        scores = self.preference.score(asked, offered.unflatten(0, shape)).masked_fill(~mask, -1e4)
        nearest = nearest_of(batch, cut_out(batch.neighbors), mask)
        naming = (F.cross_entropy(scores, nearest, reduction="none") * several).mean()
        return placing, naming, (scores.argmax(1) == nearest)[several]
