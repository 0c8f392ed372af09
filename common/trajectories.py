"""Live trajectories of one stage, advanced together: rows of different plans, steps and seeds share each batch.

The trainer's previews, the embedded runtime and the served stages all run these lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.conditioning import keep
from common.diffusion.guidance import BRANCHES
from common.diffusion.parameterization import Prediction, diffuse
from common.diffusion.plan import Plan
from common.diffusion.randomness import normal
from common.diffusion.sampler import StepTable, advance
from common.diffusion.schedule import alpha_sigma
from common.unet.condition import Condition, concatenate
from common.unet.unet import UNet


@dataclass(kw_only=True)
class Trajectory:
    """One sample on its way from noise to picture.

    Attributes:
        plan, table: what is to be done.
        condition: of one row.
        x_t, x0: float32 [3, S, S]; x0 is the last step's estimate, what a preview shows.
        step: steps done.
    """

    plan: Plan
    table: StepTable
    condition: Condition
    x_t: Tensor
    x0: Tensor
    noise: np.random.Generator
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == len(self.table)


def begin(plan: Plan, condition: Condition) -> Trajectory:
    """A trajectory at its first step; `condition` has one row."""
    device, dtype = condition.text_embedding.device, torch.float32
    start = torch.from_numpy(plan.start()).to(device, dtype)
    return Trajectory(plan=plan, table=plan.table(), condition=condition, x_t=start, x0=start, noise=plan.step_noise())


def noised_low_res(plan: Plan, low_res: Tensor) -> tuple[Tensor, Tensor]:
    """The low-resolution picture [3, h, w] as the plan wants it: (noised [1, 3, h, w], its log-SNR [1]).

    Noise-conditioning augmentation (Imagen, section 2.4; Ho et al. 2022, section 4).
    """
    level = plan.augmentation_log_snr()
    alpha, sigma = alpha_sigma(np.float64(level))
    if plan.augmentation:
        noise = torch.from_numpy(plan.augmentation_noise(tuple(low_res.shape))).to(low_res)
        low_res = diffuse(low_res, noise, float(alpha), float(sigma))
    return low_res[None], torch.tensor([level], device=low_res.device, dtype=torch.float32)


@torch.inference_mode()
def step_together(unet: UNet, prediction: Prediction, live: Sequence[Trajectory]) -> None:
    """Advance each trajectory by one step; all their guidance branches are rows of one batch."""
    rows: list[tuple[int, int]] = []
    for index, trajectory in enumerate(live):
        rows += [(index, int(c)) for c in np.flatnonzero(trajectory.table.guidance[trajectory.step])]
    device = live[0].x_t.device
    condition = concatenate([t.condition for t in live]) if len(live) > 1 else live[0].condition
    owners = torch.tensor([index for index, _ in rows], device=device)
    text = torch.tensor([BRANCHES[column][0] for _, column in rows], device=device)
    neighbors = torch.tensor([BRANCHES[column][1] for _, column in rows], device=device)
    x_t = torch.stack([live[index].x_t for index, _ in rows]).contiguous(memory_format=torch.channels_last)
    log_snr = torch.tensor([float(live[index].table.log_snr[live[index].step]) for index, _ in rows], device=device)
    said = unet(x_t.to(unet.dtype), log_snr, keep(condition.take(owners), text, neighbors)).float()
    by_trajectory: list[dict[int, Tensor]] = [{} for _ in live]
    for row, (index, column) in enumerate(rows):
        by_trajectory[index][column] = said[row]
    for trajectory, predictions in zip(live, by_trajectory, strict=True):
        _advance(trajectory, prediction, predictions)


def _advance(trajectory: Trajectory, prediction: Prediction, predictions: dict[int, Tensor]) -> None:
    shape = tuple(trajectory.x_t.shape)
    trajectory.x_t, trajectory.x0 = advance(
        trajectory.table,
        trajectory.step,
        trajectory.x_t,
        trajectory.x0,
        predictions,
        prediction=prediction,
        thresholding=trajectory.plan.thresholding,
        noise=lambda: torch.from_numpy(normal(trajectory.noise, shape)).to(trajectory.x_t),
    )
    trajectory.step += 1


def run_together(
    unet: UNet,
    prediction: Prediction,
    plans: Sequence[Plan],
    condition: Condition,
    *,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Run plans side by side to their ends; row i of `condition` belongs to plan i. Returns float32 [B, 3, S, S]."""
    trajectories = [begin(plan, condition.take(torch.tensor([i]))) for i, plan in enumerate(plans)]
    steps = 0
    while live := [t for t in trajectories if not t.done]:
        step_together(unet, prediction, live)
        steps += 1
        on_step(steps)
    return torch.stack([t.x_t for t in trajectories])
