"""The cascade in process and in batches: what the evaluation of many prompts runs, on the services' own parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import StageWeights, load_stage
from common.images import from_unit, over_color, rasterize, to_unit
from common.stages import STAGES, StageSpec, stage
from common.text import TextEncoder, packaged_encoder
from common.trajectories import noised_low_res, run_together
from common.unet.condition import Condition
from common.unet.packed import packed
from retrieval_svc.retrieval import Neighbor

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Loaded stages and the text encoder."""

    stages: dict[int, StageWeights]
    encoder: TextEncoder

    @classmethod
    def load(cls, weights: Path, sizes: Sequence[int] = tuple(spec.size for spec in STAGES)) -> Cascade:
        """Load stages of a weights folder; CheckpointError names what is wrong."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stages = {size: load_stage(weights, size, device=device) for size in sizes}
        return cls(
            stages={size: replace(each, unet=packed(each.unet)) for size, each in stages.items()},
            encoder=TextEncoder(packaged_encoder(), device=device),
        )

    def draw_64(
        self,
        prompts: Sequence[str],
        neighbors: Sequence[Sequence[Neighbor]],
        *,
        seed: int,
        spec: StageSpec | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[np.ndarray]:
        """One 64-pixel picture a prompt (uint8 [64, 64, 3]); sample i of the seed, whatever the batches."""
        spec = spec or stage(64)
        pictures: list[np.ndarray] = []
        for start in range(0, len(prompts), BATCH):
            end = min(start + BATCH, len(prompts))
            condition = self._condition(prompts[start:end], neighbors[start:end])
            plans = [spec.plan(seed, sample=i) for i in range(start, end)]
            drawn = run_together(self.stages[64].unet, spec.prediction, plans, condition)
            pictures += list(from_unit(drawn.movedim(1, -1).cpu().numpy()))
            progress(end)
        return pictures

    def enlarge(self, pixels: np.ndarray, size: int, *, seed: int, sample: int) -> np.ndarray:
        """uint8 [size / 4, size / 4, 3] -> uint8 [size, size, 3] by the stage's default plan."""
        spec = stage(size)
        unet, plan = self.stages[size].unet, spec.plan(seed, sample)
        low_res, level = noised_low_res(plan, _image(pixels).to(unet.device))
        none = torch.zeros(1, 0, dtype=torch.bool, device=unet.device)
        width = unet.config.text_width
        with torch.inference_mode():
            condition = unet.condition(
                text=torch.zeros(1, 0, width, device=unet.device),
                text_mask=none,
                neighbors=torch.zeros(1, 0, 3, size, size, device=unet.device),
                neighbor_text=torch.zeros(1, 0, 0, width, device=unet.device),
                neighbor_text_mask=none[None],
                neighbor_mask=none,
                low_res=low_res.contiguous(memory_format=torch.channels_last),
                augmentation=level,
            )
            drawn = run_together(unet, spec.prediction, [plan], condition)
        return from_unit(drawn[0].movedim(0, -1).cpu().numpy())

    @torch.inference_mode()
    def _condition(self, prompts: Sequence[str], neighbors: Sequence[Sequence[Neighbor]]) -> Condition:
        unet = self.stages[64].unet
        text, mask = self.encoder.encode(prompts)
        count = max((len(found) for found in neighbors), default=0)
        pictures = torch.zeros(len(prompts), count, 3, 64, 64)
        captions = [""] * (len(prompts) * count)
        present = torch.zeros(len(prompts), count, dtype=torch.bool)
        for row, found in enumerate(neighbors):
            for column, neighbor in enumerate(found):
                pictures[row, column] = _image(neighbor_picture(neighbor, 64))
                captions[row * count + column] = neighbor.pair.caption
                present[row, column] = True
        if count:
            flat_text, flat_mask = self.encoder.encode(captions)
            neighbor_text, neighbor_mask = flat_text.unflatten(0, present.shape), flat_mask.unflatten(0, present.shape)
        else:
            neighbor_text = torch.zeros(len(prompts), 0, 1, self.encoder.width)
            neighbor_mask = torch.zeros(len(prompts), 0, 1, dtype=torch.bool)
        return unet.condition(
            text=text.to(unet.device),
            text_mask=mask.to(unet.device),
            neighbors=pictures.to(unet.device),
            neighbor_text=neighbor_text.to(unet.device),
            neighbor_text_mask=neighbor_mask.to(unet.device),
            neighbor_mask=present.to(unet.device),
        )


def neighbor_picture(neighbor: Neighbor, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a neighbor over white."""
    return over_color(rasterize(neighbor.image, neighbor.pair.image_format, size), (255, 255, 255))


def guided_by_text(spec: StageSpec) -> StageSpec:
    """The stage as it draws without neighbors: plain guidance at every step, with the text's weight.

    Interleaved guidance would leave the neighbor steps unguided, and flatter the comparison.
    """
    return replace(spec, guidance=replace(spec.guidance, strategy="joint"))


def _image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(to_unit(pixels)).movedim(-1, 0)
