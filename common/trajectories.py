"""Live trajectories of one stage, advanced together: rows of different plans, steps and seeds share each batch.

The trainer's previews, the embedded runtime and the served stages all run these lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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
from common.unet.condition import Condition, Newcomers, concatenate
from common.unet.unet import UNet

NEWCOMERS = 4  # neighbors that a pass of fewer rows encodes, too


@dataclass(kw_only=True)
class Trajectory:
    """One sample on its way from noise to picture.

    Attributes:
        plan, table: what is to be done.
        condition: of one row.
        negative: the same under the text that is not to be drawn: what is read wherever guidance leaves the text out;
            None: the null text.
        newcomers: its neighbors, where no pass has encoded them; conditions have room for them.
        x_t, x0: float32 [3, S, S]; x0 is the last step's estimate, what a preview shows.
        step: steps done.
    """

    plan: Plan
    table: StepTable
    condition: Condition
    negative: Condition | None
    x_t: Tensor
    x0: Tensor
    noise: np.random.Generator
    step: int = 0
    newcomers: Newcomers | None = None

    @property
    def done(self) -> bool:
        return self.step == len(self.table)


def begin(
    plan: Plan,
    condition: Condition,
    *,
    negative: Condition | None = None,
    newcomers: Newcomers | None = None,
    start: np.ndarray | None = None,
) -> Trajectory:
    """A trajectory at its first step.

    Args:
        condition: of one row.
        negative: see `Trajectory` and `under_text`; of one row.
        newcomers: the neighbors of `condition` where they are encoded `later`; one set, of which the plans of an order
            share the object, so that it is encoded once.
        start: the picture that it begins with, float32 in [-1, 1] [3, S, S], see `Plan.start_time`.

    Raises:
        ValueError: the plan begins with a picture, and there is none, or it has another shape.
    """
    device, dtype = condition.text_embedding.device, torch.float32
    x_t = torch.from_numpy(plan.start(start)).to(device, dtype)
    return Trajectory(
        plan=plan,
        table=plan.table(),
        condition=condition,
        negative=negative,
        x_t=x_t,
        x0=x_t,
        noise=plan.step_noise(),
        newcomers=newcomers,
    )


@torch.inference_mode()
def under_text(unet: UNet, condition: Condition, text: Tensor, text_mask: Tensor) -> Condition:
    """`condition` under another text [B, L, D], mask [B, L]: what was computed of its neighbors is shared."""
    rows, super_resolves = text.shape[0], unet.config.scale > 1
    other = unet.condition(
        text=text,
        text_mask=text_mask,
        neighbors=text.new_zeros(rows, 0, 3, unet.config.patch, unet.config.patch),
        neighbor_text=text.new_zeros(rows, 0, *text.shape[1:]),
        neighbor_text_mask=text_mask.new_zeros(rows, 0, text.shape[1]),
        neighbor_mask=text_mask.new_zeros(rows, 0),
        low_res=condition.low_res if super_resolves else None,
        augmentation=condition.augmentation if super_resolves else None,
    )
    return replace(
        other,
        neighbors=condition.neighbors,
        neighbor_mask=condition.neighbor_mask,
        pictures=condition.pictures,
        offered=condition.offered,
    )


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
    """Advance each trajectory by one step; all their guidance branches are rows of one batch.

    Neighbors that are not encoded are rows of its first half, too: the DStack reads them beside the pictures.
    """
    rows = [(i, int(column)) for i, t in enumerate(live) for column in np.flatnonzero(t.table.guidance[t.step])]
    device = live[0].x_t.device
    x_t = torch.stack([live[index].x_t for index, _ in rows]).contiguous(memory_format=torch.channels_last)
    log_snr = torch.tensor([float(live[index].table.log_snr[live[index].step]) for index, _ in rows], device=device)
    newcomers = _newcomers(unet, live, rows)
    forward = partial(unet.denoise, newcomers=newcomers) if newcomers else unet  # compilers know no newcomers
    said = forward(x_t.to(unet.dtype), log_snr, _conditions(live, rows), bold=True).float()
    _take_encoded(live)
    by_trajectory: list[dict[int, Tensor]] = [{} for _ in live]
    for row, (index, column) in enumerate(rows):
        by_trajectory[index][column] = said[row]
    for trajectory, predictions in zip(live, by_trajectory, strict=True):
        _advance(trajectory, prediction, predictions)


@torch.inference_mode()
def encode_apart(unet: UNet, trajectory: Trajectory) -> None:
    """Encode a trajectory's neighbors now, where no pass has: its next step has rows of its own alone."""
    newcomers = trajectory.newcomers
    if newcomers is not None and newcomers.encoded is None:
        newcomers.encoded = unet.encode(newcomers)
    _take_encoded([trajectory])


def _newcomers(
    unet: UNet, live: Sequence[Trajectory], rows: Sequence[tuple[int, int]]
) -> list[tuple[Newcomers, list[int]]]:
    """Sets that this pass encodes, each with the rows that read it. Those that would be more than its rows are encoded now."""
    _take_encoded(live)
    found = {id(t.newcomers): t.newcomers for t in live if t.newcomers is not None}
    taken, room = [], max(len(rows), NEWCOMERS)
    for newcomers in found.values():
        if newcomers.num_pictures > room:
            newcomers.encoded = unet.encode(newcomers)
            continue
        room -= newcomers.num_pictures
        taken.append((newcomers, [row for row, (i, _) in enumerate(rows) if live[i].newcomers is newcomers]))
    _take_encoded(live)
    return taken


def _take_encoded(live: Sequence[Trajectory]) -> None:
    """Put what has been encoded, by whichever pass, into the conditions that have room for it."""
    for t in live:
        if t.newcomers is not None and t.newcomers.encoded is not None:
            t.condition = replace(t.condition, neighbors=t.newcomers.encoded)
            t.negative = t.negative and replace(t.negative, neighbors=t.newcomers.encoded)
            t.newcomers = None


def _conditions(live: Sequence[Trajectory], rows: Sequence[tuple[int, int]]) -> Condition:
    """The condition of each row (trajectory, guidance column)."""
    conditions = [t.condition for t in live]
    owners: list[int] = []
    keeps: list[tuple[bool, bool]] = []
    negatives: dict[int, int] = {}
    for index, column in rows:
        text, neighbors = BRANCHES[column]
        negative, owner = live[index].negative, index
        if negative is not None and not text:
            if index not in negatives:
                negatives[index] = len(conditions)
                conditions.append(negative)
            owner, text = negatives[index], True
        owners.append(owner)
        keeps.append((text, neighbors))
    device = live[0].x_t.device
    together = concatenate(conditions) if len(conditions) > 1 else conditions[0]
    text_kept, neighbors_kept = torch.tensor(keeps, device=device).unbind(1)
    return keep(together.take(torch.tensor(owners, device=device)), text_kept, neighbors_kept)


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
