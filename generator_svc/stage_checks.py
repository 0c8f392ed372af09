"""Whether an order's plans and inputs are what a stage's network reads: whatever is not is named, and ends that order
alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.diffusion.plan import Plan
from common.service.errors import InvalidArgument
from common.unet.config import UNetConfig
from generator_svc.stage_inputs import StageInputs


def check_inputs(unet: UNetConfig, size: int, plans: Sequence[Plan], inputs: StageInputs) -> None:
    """See that every shape is right, and every number finite.

    Raises:
        InvalidArgument: one is not; the message names it.
    """
    if not plans:
        raise InvalidArgument("plans", "there is none")
    for i, plan in enumerate(plans):
        if plan.stage != size:
            raise InvalidArgument(f"plans[{i}].stage", f"{plan.stage} is not {size}")
        if plan.start_time < 1.0 and inputs.start is None:
            raise InvalidArgument("start", f"is missing: plans[{i}] begins at time {plan.start_time:g}")
    _check_text("text", inputs.text, inputs.text_mask, (), unet.text_width)
    _check_neighbors(unet, size, inputs)
    if inputs.negative_text is not None or inputs.negative_text_mask is not None:
        if inputs.negative_text is None or inputs.negative_text_mask is None:
            raise InvalidArgument("negative_text", "comes with negative_text_mask, or not at all")
        if not unet.text_width:
            raise InvalidArgument("negative_text", f"stage {size} reads no text")
        _check_text("negative_text", inputs.negative_text, inputs.negative_text_mask, (), unet.text_width)
    if unet.scale > 1:
        side = size // unet.scale
        if inputs.low_res is None:
            raise InvalidArgument("low_res", f"is missing: stage {size} starts from pictures of {side} pixels")
        _check("low_res", inputs.low_res, (len(plans), 3, side, side))
    elif inputs.low_res is not None:
        raise InvalidArgument("low_res", f"stage {size} starts from no picture")
    if inputs.start is not None:
        one_each = len(plans) if len(inputs.start) != 1 else 1
        _check("start", inputs.start, (one_each, 3, size, size))


def _check_neighbors(unet: UNetConfig, size: int, inputs: StageInputs) -> None:
    if inputs.neighbors.ndim != 4:
        raise InvalidArgument("neighbors", f"{list(inputs.neighbors.shape)} has not 4 dimensions")
    count = len(inputs.neighbors)
    if count and not unet.uses_neighbors:
        raise InvalidArgument("neighbors", f"stage {size} reads none")
    side = size if count else inputs.neighbors.shape[1]  # none have no size
    _check("neighbors", inputs.neighbors, (count, side, side, 3))
    _check_text("neighbor_text", inputs.neighbor_text, inputs.neighbor_text_mask, (count,), unet.text_width)


def _check_text(name: str, states: np.ndarray, mask: np.ndarray, lead: tuple[int, ...], width: int) -> None:
    if states.ndim != len(lead) + 2:
        raise InvalidArgument(name, f"{list(states.shape)} has not {len(lead) + 2} dimensions")
    length = states.shape[-2]
    if width and not length:
        raise InvalidArgument(name, "has no token")
    _check(name, states, (*lead, length, width))
    _check(f"{name}_mask", mask, (*lead, length))


def _check(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InvalidArgument(name, f"{list(array.shape)} is not {list(shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidArgument(name, "holds a number that is not finite")
