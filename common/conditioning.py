"""The null condition, in one place: a dropped text or a dropped neighbor set is one whose masks are off.

Training dropout and guidance branches both drop by `keep`, so that what guidance subtracts is what training learned.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from common.unet.condition import Condition


def keep(condition: Condition, text: Tensor, neighbors: Tensor) -> Condition:
    """The condition with text kept where `text` [B] is true, and neighbors where `neighbors` [B] is true."""
    return replace(
        condition,
        text_mask=condition.text_mask & text[:, None],
        text_embedding=condition.text_embedding * text[:, None].to(condition.text_embedding.dtype),
        placement=condition.placement * text[:, None].to(condition.placement.dtype),
        asked=condition.asked * text[:, None].to(condition.asked.dtype),
        neighbor_mask=condition.neighbor_mask & neighbors[:, None],
    )
